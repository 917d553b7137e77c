"""The process and its machine: launchers, batch jobs, small files, CPU stand-ins for what GPUs bring."""
