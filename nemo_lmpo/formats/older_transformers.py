"""Files that transformers 5 wrote, in the form of 4.57, which both read: other programs still stand on the older one.

4.57 takes a config with `rope_parameters` for one of the default rotary base, and a Qwen3-MoE with
`num_local_experts` for one of 128 experts, without a word; it knows no tokenizer class `TokenizersBackend`, and fails
on a list of `extra_special_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemo_lmpo.formats.architecture import Architecture, architecture_to_hf, parse_json

_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def older_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """A `config.json` with base and scaling of the rotary embedding in two fields, and experts in the family's own."""
    older, experts = dict(config), architecture.family.experts
    if experts is not None and experts.number not in older:
        older[experts.number] = older.pop("num_local_experts", architecture_to_hf(architecture)[experts.number])
    if "rope_parameters" not in config:
        return older
    both = architecture_to_hf(architecture)
    kept = {name: value for name, value in older.items() if name != "rope_parameters"}
    return {**kept, "rope_theta": both["rope_theta"], "rope_scaling": both["rope_scaling"]}


def older_tokenizer_config(content: bytes, origin: str) -> bytes:
    """A `tokenizer_config.json` with a class that both know, unchanged where it needs no change.

    Raises:
        CheckpointError: it is damaged.
    """
    config = parse_json(content, f"{origin}: tokenizer_config.json")
    changed = dict(config)
    if config.get("tokenizer_class") == _NEW_CLASS:
        changed["tokenizer_class"] = _OLD_CLASS
    if isinstance(config.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return content if changed == config else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
