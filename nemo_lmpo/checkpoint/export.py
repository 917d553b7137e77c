"""The policy in training as a `.nemo`, whatever layout it trains in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from nemo_lmpo.checkpoint.agreement import on_main_rank
from nemo_lmpo.checkpoint.weights import describe_weights, sharded_weights
from nemo_lmpo.checkpoint.writers import write_state
from nemo_lmpo.formats.conversion import plan, write_nemo
from nemo_lmpo.formats.model_files import EMBEDDED_FOLDER, TRAINING_WEIGHTS, open_model
from nemo_lmpo.model.packed_gpt import PackedGPTModel


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
        write_state(sharded_weights(describe_weights(chunks)), parts / TRAINING_WEIGHTS, in_background=False)
        on_main_rank(convert)
    finally:
        on_main_rank(lambda: shutil.rmtree(parts, ignore_errors=True))
