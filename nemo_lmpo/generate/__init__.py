"""Responses of a model: greedy or sampled, through `transformers`, from any form that a model is stored in."""
