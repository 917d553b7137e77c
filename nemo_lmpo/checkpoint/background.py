"""Whether a run's checkpoints are written while training goes on."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from nemo_lmpo.checkpoint.agreement import from_all_ranks
from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.runtime.files import format_bytes
from nemo_lmpo.runtime.host_memory import available_bytes
from nemo_lmpo.sizing.host_memory import background_bytes

SHARE = 0.9
"""Of the available host memory, what pinned blocks may take."""

_logger = logging.getLogger(__name__)


def saves_in_background(layout: ParallelLayout, device: torch.device) -> bool:
    """What `checkpoint.async_save` comes to: `auto` is true on GPUs where every node has the memory for it.

    On CPUs it is false: the writers would take the cores, and copies of the memory, that training works on.
    Communicates: one object all-gather over all ranks where there is something to decide.
    """
    wanted: bool | str = layout.config.checkpoint.async_save
    if isinstance(wanted, bool):
        return wanted
    if device.type == "cpu":
        return False
    needed = background_bytes(layout)
    least = min(from_all_ranks(available_bytes()))
    fits: bool = needed <= SHARE * least
    if dist.get_rank() == 0:
        how = "in the background" if fits else "while training waits"
        _logger.info(
            "checkpoints are written %s: in the background they need %s of a node's memory, of which %s are available "
            "(checkpoint.async_save=auto)",
            how,
            format_bytes(needed),
            format_bytes(least),
        )
    return fits
