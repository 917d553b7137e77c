"""Which model is evaluated: its identity, its row of the paper, and its prompts as token ids."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nemo_lmpo.answers.identity import check_one_bos, weights_hash
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.evaluate.data_files import Instruction
from nemo_lmpo.evaluate.result import Model
from nemo_lmpo.evaluate.suites import METHOD_OF_LOSS, METHODS, PAPER_LAMBDA_ELSE, SETTING_OF_RECIPE, lambda_variant
from nemo_lmpo.runtime.files import content_hash

if TYPE_CHECKING:
    from nemo_lmpo.answers.engine import Prompting

VARIANTS = ("no_z_score", "no_average_length", "log", "cube", "sigmoid")
"""Rows of Table 2 by the settings that make them."""


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
    check_one_bos(found, prompting.tokenizer.bos_token_id, "instruction")
    return found
