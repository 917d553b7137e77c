"""The command that answers prompts with a model."""
