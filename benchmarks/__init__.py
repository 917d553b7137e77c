"""Scripts that measure speed and memory; each says at its head how it is run."""
