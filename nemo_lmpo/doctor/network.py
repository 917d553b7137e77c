"""Whether the processes that were started reach each other, and how fast."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from nemo_lmpo.doctor.findings import Finding

SMALL, LARGE = 1024, 16 * 2**20
"""Numbers of the tensor that is checked, and of the one that is timed (64 MB)."""
ROUNDS = 5


def network(device: torch.device) -> Iterator[Finding]:
    """An all-reduce, an all-gather and a ring of sends over all processes; every rank calls it."""
    size, rank = dist.get_world_size(), dist.get_rank()
    backend = dist.get_backend().upper()
    if size == 1:
        text = "one process; start it with torchrun or srun to try the network between more"
        yield Finding("network", backend, text, "note")
        return
    found = torch.full((SMALL,), float(rank + 1), device=device)
    dist.all_reduce(found)
    right = bool((found == size * (size + 1) / 2).all())
    yield _checked(backend, f"all-reduce over {size} processes", right)
    parts = [torch.empty(SMALL, device=device) for _ in range(size)]
    dist.all_gather(parts, torch.full((SMALL,), float(rank), device=device))
    yield _checked(backend, "all-gather", all(bool((part == float(i)).all()) for i, part in enumerate(parts)))
    received = torch.empty(SMALL, device=device)
    ring = [
        dist.P2POp(dist.isend, torch.full((SMALL,), float(rank), device=device), (rank + 1) % size),
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    yield _checked(backend, "send and receive", bool((received == float((rank - 1) % size)).all()))
    yield Finding("network", backend, f"all-reduce of 64 MB at {_speed(device, size) / 1e9:.1f} GB/s a process")


def _checked(backend: str, what: str, right: bool) -> Finding:
    return Finding("network", backend, what if right else f"{what}: wrong values", "good" if right else "problem")


def _speed(device: torch.device, size: int) -> float:
    """Bytes/s that a process sends in a ring."""
    tensor = torch.zeros(LARGE, device=device)
    dist.all_reduce(tensor)
    _wait(device)
    started = time.monotonic()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor)
    _wait(device)
    return ROUNDS * 2 * tensor.nbytes * (size - 1) / size / (time.monotonic() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
