"""Weights in and out: Hugging Face tensors, Megatron parameters, and the checkpoint files that hold them.

The package imports nothing heavy by itself; import the modules that you need.
"""
