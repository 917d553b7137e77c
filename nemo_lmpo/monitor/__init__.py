"""What the user sees of a run: banner, console, metric files, throughput."""
