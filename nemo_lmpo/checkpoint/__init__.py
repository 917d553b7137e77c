"""What outlives the process: checkpoints, optimizer and random states, the run directory, exports."""
