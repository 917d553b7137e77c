"""Preference losses: pure functions on ``[B]`` tensors. Imports torch only."""
