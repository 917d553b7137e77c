"""Programs for the scoring environment, which has `alpaca_eval`, `lm_eval` and `tiktoken` but not this package.

The folder is started as one program by :mod:`nemo_lmpo.evaluate.environment`, with a module's name: its `answer` takes
what one JSON file holds and gives what goes to another. So they import nothing of this package, and this package
imports none of them.
"""
