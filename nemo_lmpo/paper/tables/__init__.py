"""The tables of the paper with measured values, differences and verdicts on its claims."""
