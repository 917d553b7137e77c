"""The CPU in a GPU's place: what is meant for GPUs runs to its end where there is none.

`pytest tests/gpu --rehearse`, `bash benchmarks/gpu_half_hour.sh --rehearse` and `python -m tests.rehearsal MODULE` use
it; see the README beside this file.
"""
