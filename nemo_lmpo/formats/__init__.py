"""A model on disk: Hugging Face, NeMo and megatron-core forms, read and written tensor by tensor."""
