"""A model in training, as a generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.architecture import architecture_to_hf
from nemo_lmpo.training.checkpoint import STATE, on_main_rank
from nemo_lmpo.training.run_directory import ARCHITECTURE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_lmpo.training.lmpo_model import MegatronGPTLMPOModel


def save_policy(model: MegatronGPTLMPOModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the present weights of a policy, in any layout, so that :func:`load_generator` opens ``directory``.

    All ranks call this together, with one directory that all of them see.
    """
    from megatron.core import dist_checkpointing

    on_main_rank(lambda: (directory / STATE).mkdir(parents=True, exist_ok=True))
    state = {f"model{index}": chunk.sharded_state_dict(prefix="model.") for index, chunk in enumerate(model.policy)}
    dist_checkpointing.save(state, str(directory / STATE))
    on_main_rank(lambda: _write_companions(model, tokenizer, directory))


def _write_companions(model: MegatronGPTLMPOModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    (directory / ARCHITECTURE_FILE).write_text(json.dumps(architecture_to_hf(model.architecture), indent=1))
    tokenizer.save_pretrained(directory / "tokenizer")
