"""Programs for the scoring environment, which has `alpaca_eval`, `lm_eval` and `tiktoken` but not this package.

They are started as files by :mod:`nemo_lmpo.evaluate.environment`: one JSON file in, one out. So they import nothing of
this package, and this package imports none of them.
"""
