"""Process groups, collectives and vocabulary-parallel log-probabilities."""
