"""A mixture's experts as transformers 5 keeps them in memory, and can save them: all of a layer in one tensor.

Files on the hub have a tensor for each expert, which is what transformers 5, too, writes unless it is told otherwise
(`save_original_format=False`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nemo_lmpo.formats.families import ExpertNames

_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate\.weight|experts\.gate_up_proj|experts\.down_proj)")

Selection = tuple[int | slice, ...]
"""What of a stored tensor a tensor is; empty: all of it."""


def separate_experts(
    stored: str, shape: tuple[int, ...], names: ExpertNames
) -> Iterator[tuple[str, Selection, tuple[int, ...]]]:
    """The tensors of a stored one: their names as on the hub, where they lie in it, and their shapes.

    `gate_up_proj` is ``[experts, 2 * width, hidden]``, gate above up, and `down_proj` ``[experts, hidden, width]``.
    """
    found = _FUSED.fullmatch(stored)
    if found is None or (found[2] == "gate.weight") != (len(shape) == 2):
        yield stored, (), shape
        return
    block = f"{found[1]}.{names.block}"
    if found[2] == "gate.weight":
        yield f"{block}.gate.weight", (), shape
        return
    for expert in range(shape[0]):
        first = f"{block}.experts.{expert}"
        if found[2] == "experts.down_proj":
            yield f"{first}.{names.down}.weight", (expert,), shape[1:]
            continue
        width = shape[1] // 2
        yield f"{first}.{names.gate}.weight", (expert, slice(0, width)), (width, *shape[2:])
        yield f"{first}.{names.up}.weight", (expert, slice(width, shape[1])), (shape[1] - width, *shape[2:])
