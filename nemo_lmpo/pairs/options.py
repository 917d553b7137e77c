"""Options of the command, as typed groups with their bounds, and the parser that fills them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.errors import ConfigError, one_per_line
from nemo_lmpo.pairs.folder import FORMATS
from nemo_lmpo.pairs.rules import BEST_WORST, RULES
from nemo_lmpo.settings import options_out_of_bounds, setting

PUBLISHED_TEMPERATURE, PUBLISHED_TOP_P, PUBLISHED_TOKENS = 0.8, 0.95, 4096
"""Of SimPO's sets of own answers."""
PATHS = ("pooling", "classify", "score")
SAMPLE, SCORE, CHOOSE = "sample", "score", "choose"
DECIDE_NOTHING = (
    *("quiet", "concurrency", "requests_per_minute", "retries", "key", "judge_key", "reward_key"),
    *("judge_endpoint", "reward_endpoint"),
)
"""Options that may differ between commands that continue the same rounds: pace, keys, and where servers are."""


@dataclass(frozen=True)
class Counts:
    """Options that are numbers, with their bounds."""

    samples: int = setting(5, minimum=1, maximum=1024)
    """Answers of each model to each prompt."""
    limit: int | None = setting(None, minimum=1, remedy="leave it out for all prompts")
    score_batch_size: int | None = setting(None, minimum=1)


def checked_counts(options: argparse.Namespace) -> Counts:
    """The counts that the options hold.

    Raises:
        ConfigError: naming each that means nothing, one per line.
    """
    counts = Counts(options.samples, options.limit, options.score_batch_size)
    problems = list(options_out_of_bounds(counts))
    wrong = [seed for seed in options.seeds or () if not 0 <= seed <= 2**31 - 1]
    problems += [f"--seeds {seed} must be at least 0 and less than 2147483648" for seed in wrong]
    if options.seeds and len(set(options.seeds)) < len(options.seeds):
        problems.append("--seeds holds a seed twice, which would give the same answers; give different ones")
    if problems:
        raise ConfigError(one_per_line(problems))
    return counts


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How answers are sampled; the seed is that of each candidate.

    Raises:
        ConfigError: a value that means nothing.
    """
    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_p, options.top_k, batch_size=options.batch_size
    )
    sampling.validate()
    if sampling.temperature == 0:
        raise ConfigError("--temperature 0 gives the same answer every time, and no pairs; set it above 0")
    return sampling


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything but which models and where to: what `rounds` has, too."""
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="SOURCE",
        help="a file, saved dataset, hub name or builtin:NAME",
    )
    parser.add_argument("--split", default="train", help="of hub datasets and builtin tasks (default: train)")
    parser.add_argument("--prompt-field", metavar="NAME", help="column of the prompt (default: as training finds it)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N distinct prompts only")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out and count rows without a prompt")
    _add_sampling(parser.add_argument_group("sample"))
    _add_scoring(parser.add_argument_group("score"))
    _add_choosing(parser.add_argument_group("choose"))
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
    parser.add_argument("--requests-per-minute", type=float, metavar="N", help="at most (default: no limit)")
    parser.add_argument("--retries", type=int, default=8, metavar="N", help="of a request (default: 8)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def words_of(options: argparse.Namespace, leave_out: Sequence[str] = ()) -> list[str]:
    """The options that :func:`add_options` adds as words of a command line, those at their defaults left out.

    Args:
        options: of a command line.
        leave_out: names of further ones.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    words: list[str] = []
    for action in parser._actions:
        value = getattr(options, action.dest)
        if value == action.default or action.dest in leave_out:
            continue
        values = value if isinstance(value, list) else [value]
        words += [action.option_strings[0], *([] if value is True else map(str, values))]
    return words


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--samples", type=int, default=5, metavar="N", help="answers of each model (default: 5)")
    group.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="one for each answer (default: 13 21 42 79 100, and so on)"
    )
    group.add_argument(
        "--temperature", type=float, default=PUBLISHED_TEMPERATURE, metavar="T", help="default: 0.8, as published"
    )
    group.add_argument("--top-p", type=float, default=PUBLISHED_TOP_P, metavar="P", help="default: 0.95, as published")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="default: all tokens")
    group.add_argument(
        "--max-new-tokens", type=int, default=PUBLISHED_TOKENS, metavar="N", help="default: 4096, or what has room"
    )
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="without a server (default: 16)")
    group.add_argument("--key", default="VLLM_API_KEY", metavar="VARIABLE", help="the server's (default: VLLM_API_KEY)")
    group.add_argument("--chat-template", metavar="NAME", help="a file or built-in name (default: as trained)")
    group.add_argument("--system-prompt", metavar="TEXT", help="for prompts without one (default: as trained)")
    group.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: the GPU if there is one)")
    group.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, else fp32")


def _add_scoring(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--reward-model", metavar="MODEL", help="Hugging Face directory or hub name, of one label")
    group.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the reward model")
    group.add_argument("--score-field", default="logits", metavar="NAME", help="of its output (default: logits)")
    group.add_argument("--score-batch-size", type=int, metavar="N", help="default: 8; 1 with --trust-remote-code")
    group.add_argument("--reward-template", metavar="NAME", help="chat template of the reward model (default: its own)")
    group.add_argument("--reward-endpoint", metavar="URL", help="a server that scores, such as vLLM's")
    group.add_argument("--reward-path", choices=PATHS, default="pooling", help="of that server (default: pooling)")
    group.add_argument("--reward-name", metavar="NAME", help="the reward model's name there (default: the only one)")
    group.add_argument("--reward-key", default="VLLM_API_KEY", metavar="VARIABLE", help="default: VLLM_API_KEY")
    group.add_argument("--judge-endpoint", metavar="URL", help="an OpenAI-compatible server with a judge")
    group.add_argument("--judge", metavar="NAME", help="the judge's name there (default: the only one)")
    group.add_argument("--judge-key", default="OPENAI_API_KEY", metavar="VARIABLE", help="default: OPENAI_API_KEY")
    group.add_argument(
        "--judge-mode",
        choices=("pointwise", "pairwise"),
        default="pointwise",
        help="a grade for each answer (default), or all pairs in both orders",
    )
    group.add_argument("--judge-prompt", type=Path, metavar="FILE", help="another text, with {prompt} and {answer}")
    group.add_argument("--judge-extra", default="{}", metavar="JSON", help="merged into each request of the judge")
    group.add_argument("--reward", metavar="MODULE:FUNCTION", help="(prompt, answers) -> scores; or FILE.py:FUNCTION")
    group.add_argument("--scores", type=Path, metavar="FILE", help="JSON Lines with `id` and `score`")


def _add_choosing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rule", default=BEST_WORST, help=f"{', '.join(RULES)} (default: {BEST_WORST})")
    group.add_argument("--max-length-ratio", type=float, metavar="X", help="of a pair's two lengths in tokens")
    group.add_argument("--length-control", action="store_true", help="take out of scores what length explains")
    group.add_argument("--rule-seed", type=int, default=42, metavar="N", help="of best-random (default: 42)")
    group.add_argument("--format", choices=FORMATS, default="jsonl", help="of the pairs (default: jsonl)")
