"""Architecture -> megatron-core model: layer specs, attention on packed sequences, rotary embedding, norms."""
