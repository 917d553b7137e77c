"""Reruns the paper's comparisons and writes what was seen, for or against the paper, on one page."""
