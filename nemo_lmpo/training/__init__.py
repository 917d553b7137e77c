"""The step: policy, pipeline, batches, optimizer, and the loop around them."""
