"""The conversion commands: Hugging Face <-> NeMo, and the check that both are one model."""
