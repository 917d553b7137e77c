"""What a machine has for training, whether it computes right, and what is in the way."""
