"""`python -m nemo_lmpo.generate --checkpoint DIR --prompts FILE`: answer prompts with a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.errors import CheckpointError, ConfigError, UserError
from nemo_lmpo.runtime.atomic import replace_file

if TYPE_CHECKING:
    from nemo_lmpo.generate.engine import Response
    from nemo_lmpo.generate.prompts import Prompt


def build_parser() -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_lmpo.generate",
        description="Answer prompts with a model: a training checkpoint, a run directory (its newest checkpoint), a "
        "Hugging Face directory, or a .nemo file. Greedy unless --temperature is given.",
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="PATH", help="the model")
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE", help="JSON Lines with `prompt`: text, or messages"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON Lines to write (default: standard output)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens (default: 512, or what the model has room for)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="sample with it (default: greedy)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--seed", type=int, default=42, help="of sampling (default: 42)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N prompts only")
    parser.add_argument("--chat-template", metavar="NAME", help="a file or built-in name (default: as trained)")
    parser.add_argument("--system-prompt", metavar="TEXT", help="for prompts without one (default: as trained)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        _run(options)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from nemo_lmpo.generate.prompts import encode_prompts, read_prompts

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit {options.limit} must be at least 1; leave it out for all prompts")
    prompts = read_prompts(options.prompts, options.limit)
    if not options.checkpoint.exists():
        raise CheckpointError(f"--checkpoint {options.checkpoint} does not exist; give a model directory or file")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        raise ConfigError(f"--output {options.output}: its directory does not exist; make it first")
    # Imported here, so that what was wrong above is answered at once.
    from tqdm import tqdm

    from nemo_lmpo.generate.engine import Sampling, load_generator

    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed, options.batch_size
    )
    sampling.validate()
    generator = load_generator(
        options.checkpoint,
        device=options.device,
        chat_template=options.chat_template,
        system_prompt=options.system_prompt,
    )
    ids = encode_prompts(prompts, generator.encoder)
    with tqdm(total=len(ids), desc="generate", unit="prompt", disable=True if options.quiet else None) as bar:
        responses = generator.respond(ids, sampling, bar.update)
    _write(options.output, prompts, responses)


def _write(output: Path | None, prompts: Sequence[Prompt], responses: Sequence[Response]) -> None:
    lines = [
        json.dumps(
            {
                "prompt": prompt.given,
                "response": response.text,
                "tokens": len(response.token_ids),
                "finished": response.finished,
            },
            ensure_ascii=False,
        )
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    text = "\n".join(lines) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        replace_file(output, text)


if __name__ == "__main__":
    sys.exit(main())
