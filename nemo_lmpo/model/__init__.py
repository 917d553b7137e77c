"""Architecture -> megatron-core model: layer specs, attention on packed rows, the NeMo plugin class."""
