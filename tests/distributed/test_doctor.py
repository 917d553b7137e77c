"""The doctor's network checks between real processes."""

from __future__ import annotations

import pytest

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.workers import run_workers


def on_rank(launch: LaunchInfo, fault: str) -> list[tuple[str, str]]:
    import torch
    import torch.distributed as dist

    from nemo_lmpo.doctor import network
    from nemo_lmpo.parallel.groups import start_process_group

    start_process_group(launch, use_cuda=False)
    network.LARGE = 1024
    if fault == "all_reduce":
        dist.all_reduce = lambda tensor, *args, **kwargs: None
    try:
        return [(finding.kind, finding.text) for finding in network.network(torch.device("cpu"))]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("fault", ["", "all_reduce"])
def test_network(fault: str) -> None:
    for findings in run_workers(2, on_rank, fault):
        kinds = [kind for kind, _ in findings]
        assert kinds == (["problem", "good", "good", "fact"] if fault else ["good", "good", "good", "fact"]), findings
