"""From a trained model to the paper's tables: answers, judgments, scores, and one page.

Suites are AlpacaEval 2 (:mod:`.alpaca_eval`), Arena-Hard v0.1 (:mod:`.arena_hard`) and ten tasks of the Open LLM
Leaderboard (:mod:`.leaderboard`). Every stage leaves files that the next command continues from.
"""
