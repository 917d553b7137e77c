"""The command that samples, scores, chooses and trains again and again, each round from the newest policy."""
