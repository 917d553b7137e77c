"""The command that makes preference pairs of a model's own answers: sample, score, choose."""
