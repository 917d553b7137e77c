"""Which model is evaluated: its identity, its row of the paper, and its prompts as token ids."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate.data_files import Instruction
from nemo_lmpo.evaluate.result import Model
from nemo_lmpo.evaluate.suites import METHOD_OF_LOSS, METHODS, PAPER_LAMBDA_ELSE, SETTING_OF_RECIPE, lambda_variant
from nemo_lmpo.runtime.files import content_hash, file_stamp, read_json, write_json

if TYPE_CHECKING:
    from nemo_lmpo.answers.engine import Prompting
    from nemo_lmpo.formats.model_files import ModelFiles

VARIANTS = ("no_z_score", "no_average_length", "log", "cube", "sigmoid")
"""Rows of Table 2 by the settings that make them."""
_WEIGHTS_FILE = "weights.json"


def parse_row(row: str) -> tuple[str, str, str | None]:
    """`SETTING/METHOD` or `SETTING/LMPO/VARIANT`.

    Raises:
        ConfigError: it names no row.
    """
    setting, _, rest = row.partition("/")
    method, _, variant = rest.partition("/")
    known = {name.lower(): name for name in METHODS}
    fine = variant in ("", *VARIANTS) or variant.startswith("lambda=")
    if not setting or method.lower() not in known or not fine:
        raise ConfigError(
            f"--row {row} names no row; give SETTING/METHOD with a method of {', '.join(METHODS)}, and for Tables 2 "
            f"and 3 SETTING/LMPO/VARIANT with a variant of {', '.join(VARIANTS)} or lambda=VALUE"
        )
    return setting, known[method.lower()], variant or None


def trained_row(config: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """Setting, method and variant from a run's configuration."""
    loss = config.get("loss") or {}
    method = METHOD_OF_LOSS.get(str(loss.get("name")))
    name = str(config.get("name", ""))
    setting: str | None = name.partition("_")[2] or None
    setting = SETTING_OF_RECIPE.get(setting or "", setting)
    if method != "LMPO":
        return setting, method, None
    if loss.get("z_score") is False:
        return setting, method, "no_z_score"
    if loss.get("average_length_normalization") is False:
        return setting, method, "no_average_length"
    if loss.get("margin", "power5") in VARIANTS:
        return setting, method, str(loss["margin"])
    return setting, method, lambda_variant(setting, float(loss.get("lam", PAPER_LAMBDA_ELSE)))


def default_name(given: str) -> str:
    """A name for a model from how it was given: the run's, the archive's, or the last part of a hub name."""
    path = Path(given)
    if path.name.startswith("step_") and path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}_{path.name}"
    return path.name.removesuffix(".nemo") or "model"


def describe(options: argparse.Namespace, prompting: Prompting, folder: Path) -> Model:
    """The model's identity; its weights' hash takes a while the first time, and is kept in ``folder``."""
    from nemo_lmpo.data.tokenizer import tokenizer_fingerprint

    row = parse_row(options.row) if options.row else trained_row(prompting.trained)
    with tqdm(desc="hash", unit="tensor", disable=True if options.quiet else None) as bar:
        weights = weights_hash(prompting.files, prompting.directory, folder, bar.update)
    chat = prompting.encoder.chat
    return Model(
        *(options.name or default_name(options.model), options.model, prompting.files.kind),
        *row,
        weights_sha256=weights,
        template_sha256=content_hash([chat.template, chat.system_prompt]),
        tokenizer_sha256=tokenizer_fingerprint(prompting.tokenizer),
    )


def weights_hash(files: ModelFiles, path: Path, folder: Path, progress: Callable[[int], object]) -> str:
    """SHA-256 of all tensors under their Hugging Face names, the same in whatever form the model is stored.

    Kept in ``folder``, so that a command that goes on does not read the weights again unless they changed.
    """
    stamp = file_stamp(path)
    kept = folder / _WEIGHTS_FILE
    if kept.exists():
        before = read_json(kept)
        if before["files"] == stamp:
            return str(before["sha256"])
    digest = _hash_tensors(files, progress)
    write_json(kept, {"files": stamp, "sha256": digest})
    return digest


def _hash_tensors(files: ModelFiles, progress: Callable[[int], object]) -> str:
    import torch

    from nemo_lmpo.formats.conversion import tensor_names

    digest = hashlib.sha256()
    for name in sorted(tensor_names(files)):
        tensor = files.source.get(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        progress(1)
    return digest.hexdigest()


def prompts_of(prompting: Prompting, instructions: Sequence[Instruction]) -> dict[str, list[int]]:
    """Token ids by instruction, rendered as in training, each with at most one BOS.

    Raises:
        DataError: the template refuses an instruction, or puts two BOS in front.
    """
    from nemo_lmpo.answers.prompts import Prompt, encode_prompts

    prompts = [
        Prompt(f"instruction {one.id}", one.text, [{"role": "user", "content": one.text}]) for one in instructions
    ]
    ids = encode_prompts(prompts, prompting.encoder)
    found = dict(zip((one.id for one in instructions), ids, strict=True))
    check_one_bos(found, prompting.tokenizer.bos_token_id)
    return found


def check_one_bos(prompts: Mapping[str, Sequence[int]], bos: int | None) -> None:
    """Refuse prompts with two BOS in front: models were not trained on that, and answer otherwise.

    Raises:
        DataError: names the first.
    """
    for name, ids in prompts.items():
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise DataError(f"the prompt of instruction {name} begins with two BOS tokens; correct the chat template")
