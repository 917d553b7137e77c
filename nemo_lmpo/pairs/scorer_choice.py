"""Which scorer the options name: exactly one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_lmpo.answers.endpoint import Endpoint, Limits, choose_model
from nemo_lmpo.answers.judge import JudgeServer, parse_extra
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.pairs import folder as files
from nemo_lmpo.pairs.candidate import AskedPrompt
from nemo_lmpo.pairs.score import Scorer
from nemo_lmpo.runtime.credentials import require_variable_name

_CHOICES = ("reward_model", "reward_endpoint", "judge_endpoint", "reward", "scores")


def open_endpoint(option: str, url: str, options: argparse.Namespace, key_option: str) -> Endpoint:
    """A server as the options have it, with the key of an environment variable."""
    variable = require_variable_name(f"--{key_option.replace('_', '-')}", getattr(options, key_option))
    limits = Limits(options.concurrency, options.requests_per_minute, options.retries)
    return Endpoint(option, url, limits, key=os.environ.get(variable), key_variable=variable)


def check_one_scorer(options: argparse.Namespace) -> None:
    """See that the options name one scorer.

    Raises:
        ConfigError: none, or several.
    """
    named = [name for name in _CHOICES if getattr(options, name) is not None]
    shown = [f"--{name.replace('_', '-')}" for name in named]
    # A server may have the reward model whose tokenizer is used here.
    if len(named) != 1 and named != ["reward_model", "reward_endpoint"]:
        all_of_them = "--reward-model, --reward-endpoint, --judge-endpoint, --reward or --scores"
        raise ConfigError(
            f"{' and '.join(shown)} name several scorers; give one of them"
            if named
            else f"nothing scores the answers; give {all_of_them}"
        )


def choose_scorer(options: argparse.Namespace, prompts: Sequence[AskedPrompt], work: Path) -> Scorer:
    """Open the scorer, as far as it costs little.

    Raises:
        UserError: it is not there, or not what it should be.
    """
    if options.reward is not None:
        from nemo_lmpo.pairs.scorers.function import open_function

        return open_function(options.reward, prompts)
    if options.scores is not None:
        from nemo_lmpo.pairs.scorers.file import read_scores

        return read_scores(options.scores)
    if options.judge_endpoint is not None:
        return _judge(options, work)
    return _reward_server(options) if options.reward_endpoint is not None else _reward_model(options)


def _judge(options: argparse.Namespace, work: Path) -> Scorer:
    from nemo_lmpo.pairs.scorers.judge import JudgeScorer
    from nemo_lmpo.pairs.scorers.judge_prompts import judge_prompt

    extra, prompt = parse_extra(options.judge_extra), judge_prompt(options.judge_mode, options.judge_prompt)
    endpoint = open_endpoint("--judge-endpoint", options.judge_endpoint, options, "judge_key")
    server = JudgeServer(endpoint, choose_model(endpoint, options.judge, "--judge"), extra)
    return JudgeScorer(server, prompt, work / files.CALLS)


def _reward_model(options: argparse.Namespace) -> Scorer:
    from nemo_lmpo.pairs.scorers.reward_model import RewardOptions, open_reward_model

    return open_reward_model(
        RewardOptions(
            options.reward_model,
            options.score_batch_size,
            options.device,
            options.dtype,
            options.trust_remote_code,
            options.score_field,
            options.reward_template,
        )
    )


def _reward_server(options: argparse.Namespace) -> Scorer:
    from nemo_lmpo.pairs.scorers.server import ServerScorer

    endpoint = open_endpoint("--reward-endpoint", options.reward_endpoint, options, "reward_key")
    name = choose_model(endpoint, options.reward_name, "--reward-name")
    if options.reward_model is None:
        return ServerScorer(endpoint, name, options.reward_path, None)
    from nemo_lmpo.data.tokenizer import load_tokenizer
    from nemo_lmpo.pairs.scorers.conversation import rendering
    from nemo_lmpo.pairs.scorers.reward_files import find_reward_model, positions_of

    directory = find_reward_model(options.reward_model)
    tokenizer = load_tokenizer(str(directory), trust_remote_code=options.trust_remote_code)
    rendered = rendering(tokenizer, options.reward_template, positions_of(directory), options.reward_model)
    return ServerScorer(endpoint, name, options.reward_path, rendered)
