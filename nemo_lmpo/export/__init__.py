"""A trained run as a Hugging Face directory with a model card, and its way to the hub."""
