"""The sliding window of attention in a Hugging Face `config.json`, where up to four fields decide it."""

from __future__ import annotations

from typing import Any

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.fields import Fields

_FULL, _SLIDING = "full_attention", "sliding_attention"
_KINDS = {_FULL: _FULL, _SLIDING: _SLIDING, "attention": _FULL}
"""What a layer may be called, and what that means; the last is an older name."""
_FIRST_WINDOWED = 28
"""`max_window_layers` where it is absent."""


def window_from_hf(fields: Fields, switch: str | None, usual: int, layers: int) -> int | None:
    """The window of all layers, as transformers works it out.

    Args:
        fields: the config.
        switch: the field without which `sliding_window` says nothing; empty: there is none; None: transformers gives
            models of this family full attention, whatever their config says.
        usual: the window where `sliding_window` is absent.
        layers: layers of the model.

    Raises:
        CheckpointError: some layers have a window and others none, or a value is not valid.
    """
    kinds = _layer_kinds(fields, layers)
    if switch is None:
        return None
    used = not switch or fields.flag(switch)
    window = fields.size("sliding_window", absent=usual, null=0) if used else 0
    if kinds is None:
        default = _FIRST_WINDOWED
        first = fields.size("max_window_layers", absent=default, null=default, least=0) if window and switch else 0
        kinds = [_SLIDING if window and layer >= first else _FULL for layer in range(layers)]
    windowed = kinds.count(_SLIDING)
    if not windowed:
        return None
    if not window:
        raise fields.error("sliding_window", "is the window of the layers that layer_types names; give its size")
    if windowed < layers:
        raise CheckpointError(
            f"{fields.origin}: {windowed} of {layers} layers have a sliding window of {window} positions and the rest "
            "has none (layer_types or max_window_layers), which is not supported; supported: the same window in all "
            "layers, or none"
        )
    return window


def _layer_kinds(fields: Fields, layers: int) -> list[str] | None:
    """The kind of attention of each layer, if the config names them."""
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers or not all(str(kind) in _KINDS for kind in kinds):
        raise fields.error("layer_types", f"does not name {_FULL} or {_SLIDING} for each layer ({layers}); fix it")
    return [_KINDS[str(kind)] for kind in kinds]


def window_to_hf(window: int | None, switch: str) -> dict[str, Any]:
    """The fields of a window of all layers, or of none."""
    if not switch:
        return {"sliding_window": window}
    return {switch: window is not None, "sliding_window": window, **({"max_window_layers": 0} if window else {})}
