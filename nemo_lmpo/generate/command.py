"""The command `nemo-lmpo generate`: answer prompts with a model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.errors import ConfigError, counted, shown
from nemo_lmpo.formats.find_model import MODEL_HELP, find_model
from nemo_lmpo.runtime.files import content_hash, file_stamp
from nemo_lmpo.runtime.interruption import Interrupted

if TYPE_CHECKING:
    from nemo_lmpo.answers.answer import Answer
    from nemo_lmpo.answers.engine import Generator, Prompting
    from nemo_lmpo.answers.prompts import Prompt
    from nemo_lmpo.answers.sampling import Sampling
    from nemo_lmpo.generate.kept import Keeper

_logger = logging.getLogger("nemo_lmpo")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Answer prompts with a model. Greedy unless --temperature is given. With --output, answers are "
        "kept as they come; an interrupted command, repeated, resumes.",
    )
    parser.add_argument("--model", "--checkpoint", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE", help="JSON Lines with `prompt`: text, or messages"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON Lines to write (default: standard output)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum (default: 512, or what the model has room for)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: greedy)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling threshold")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--seed", type=int, default=42, help="of sampling (default: 42)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts per batch (default: 8)")
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N prompts only")
    parser.add_argument("--chat-template", metavar="NAME", help="a file or built-in name (default: as trained)")
    parser.add_argument("--system-prompt", metavar="TEXT", help="for prompts without one (default: as trained)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    from nemo_lmpo.answers.prompts import encode_prompts, read_prompts
    from nemo_lmpo.generate.kept import FileKeeper, Printer, checked_output

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit {options.limit} must be at least 1; leave it out for all prompts")
    prompts = read_prompts(options.prompts, options.limit)
    model = find_model(options.model)
    output = None if options.output is None else checked_output(options.output, options.prompts)
    _check_text("--system-prompt", options.system_prompt or "")
    # Imported here, so that what was wrong above is answered at once.
    from nemo_lmpo.answers.engine import choose_device, default_dtype, open_prompting
    from nemo_lmpo.answers.sampling import Sampling

    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed, options.batch_size
    )
    sampling.validate()
    device = choose_device(options.device)
    prompting = open_prompting(model.path, chat_template=options.chat_template, system_prompt=options.system_prompt)
    ids = encode_prompts(prompts, prompting.encoder)
    keeper: Keeper
    if output is None:
        keeper = Printer(len(ids))
    else:
        keeper = FileKeeper(output, answer_settings(prompting, ids, sampling, device), len(ids))
    with keeper:
        try:
            _answer(
                keeper, prompts, ids, lambda: prompting.load(device, default_dtype(device)), sampling, options.quiet
            )
        except Interrupted as error:
            error.add_note(keeper.interrupted())
            raise
        keeper.finish()
    if output is not None:
        _logger.info("wrote %s: %s", options.output, counted(len(ids), "answer"))
    return 0


def _answer(
    keeper: Keeper,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    load: Callable[[], Generator],
    sampling: Sampling,
    quiet: bool,
) -> None:
    from tqdm import tqdm

    done = len(keeper.done)
    with tqdm(total=len(ids), initial=done, desc="generate", unit="prompt", disable=True if quiet else None) as bar:
        if done == len(ids):
            return
        for batch in load().batches(ids, sampling, keeper.done):
            keeper.keep({index: output_row(prompts[index], response) for index, response in batch.items()})
            bar.update(len(keeper.done) - bar.n)


def output_row(prompt: Prompt, response: Answer) -> dict[str, Any]:
    """A line of the output."""
    return {
        "prompt": prompt.given,
        "response": response.text,
        "tokens": response.tokens,
        "finished": response.finished,
    }


def _check_text(option: str, text: str) -> None:
    """Refuse bytes of the command line that are not UTF-8, which Python shows as half surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{option} {shown(text)} is not UTF-8 text; set the terminal's encoding to UTF-8") from None


def answer_settings(
    prompting: Prompting, ids: Sequence[Sequence[int]], sampling: Sampling, device: str
) -> dict[str, Any]:
    """What decides the answers; only a command with the same may continue another one's."""
    import torch
    import transformers

    from nemo_lmpo.answers.engine import default_dtype

    return {
        "checkpoint": str(prompting.directory.resolve()),
        "its files": content_hash(file_stamp(prompting.directory)),
        "prompts": content_hash(list(map(list, ids))),
        **asdict(sampling),
        "stop_token_ids": list(prompting.stop_ids),
        "device": device,
        "dtype": str(default_dtype(device)),
        "backend": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
