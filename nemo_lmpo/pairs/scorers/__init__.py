"""Who scores candidates: a reward model, a server, a judge, a Python function, or a file."""
