"""Answers of a model: prompts, the engine in this process, servers, and the journal that keeps answers."""
