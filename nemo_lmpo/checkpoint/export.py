"""The policy in training as a `.nemo`, whatever layout it trains in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_lmpo.checkpoint.agreement import on_main_rank
from nemo_lmpo.checkpoint.writers import write_state
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.adapters import PREFIX
from nemo_lmpo.formats.conversion import plan, write_nemo
from nemo_lmpo.formats.model_files import EMBEDDED_FOLDER, TRAINING_WEIGHTS, open_model
from nemo_lmpo.model.lora import adapters_of
from nemo_lmpo.model.packed_gpt import PackedGPTModel

EXTRA_STATE = "_extra_state"


def sharded_weights(chunks: list[PackedGPTModel]) -> dict[str, Any]:
    """This process's part of the policy's weights, as megatron-core's distributed checkpoints take them.

    Without Transformer Engine's extra states: they hold scales of FP8, which is not used, and which of them exist
    depends on the kernels, so that a checkpoint could be read by the same kernels only.
    """
    return {f"model{index}": _sharded(chunk) for index, chunk in enumerate(chunks)}


def _sharded(chunk: PackedGPTModel) -> dict[str, Any]:
    """A chunk's weights, or its adapters alone where it has some."""
    adapters = adapters_of(chunk)
    if adapters is not None:
        return adapters.sharded_state_dict(prefix=PREFIX)
    entries = chunk.sharded_state_dict(prefix="model.")
    return {name: entry for name, entry in entries.items() if not name.endswith(EXTRA_STATE)}


def load_weights(chunks: list[PackedGPTModel], state: dict[str, Any]) -> None:
    """Put weights that were loaded into :func:`sharded_weights` into the model.

    Raises:
        CheckpointError: a tensor of the model is missing, or one is there that it does not have.
    """
    for index, chunk in enumerate(chunks):
        adapters = adapters_of(chunk)
        if adapters is not None:
            adapters.load({name.removeprefix(PREFIX): tensor for name, tensor in state[f"model{index}"].items()})
            continue
        tensors = {name.removeprefix("model."): tensor for name, tensor in state[f"model{index}"].items()}
        result = chunk.load_state_dict(tensors, strict=False)
        missing = [name for name in result.missing_keys if not name.endswith(EXTRA_STATE)]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"the checkpoint is of another model: {len(missing)} tensors are missing and "
                f"{len(result.unexpected_keys)} unknown, first {[*missing, *result.unexpected_keys][0]}"
            )


def write_policy_archive(
    output: Path,
    chunks: list[PackedGPTModel],
    write_sidecars: Callable[[Path], None],
    *,
    tokenizer: str | None = None,
) -> None:
    """Write ``output`` as a `.nemo`, or as the same tree if its name does not end so; an existing one is replaced.

    All ranks call it together: each writes its part beside ``output``, from where rank 0 converts the whole.

    Args:
        output: the same on all ranks, on storage that they share.
        chunks: this process's model chunks.
        write_sidecars: writes `architecture.json`, and a tokenizer if there is one, into a directory (rank 0).
        tokenizer: directory or hub name by which NeMo shall load a tokenizer that a `.nemo` cannot hold in NeMo's
            own way; None: the archive's copy of the Hugging Face files.

    Raises:
        CheckpointError: no room on the disk, or ``output`` is in the way of something.
        OSError: it could not be written; an ``output`` that was there is untouched.
    """
    parts = output.with_name(f"{output.name}.parts")

    def prepare() -> None:
        shutil.rmtree(parts, ignore_errors=True)
        (parts / TRAINING_WEIGHTS).mkdir(parents=True)

    def convert() -> None:
        write_sidecars(parts)
        conversion = plan(open_model(parts), output)
        conversion.check([], overwrite=True)
        write_nemo(conversion, hub_name=tokenizer or EMBEDDED_FOLDER, overwrite=True)

    on_main_rank(prepare)
    try:
        write_state(sharded_weights(chunks), parts / TRAINING_WEIGHTS, in_background=False)
        on_main_rank(convert)
    finally:
        on_main_rank(lambda: shutil.rmtree(parts, ignore_errors=True))
