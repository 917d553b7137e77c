"""The two judged suites from beginning to end: answers, judgments, scores. Each stage resumes from what is there."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.completions import CompletionRequests
from nemo_lmpo.answers.endpoint import Endpoint, Limits, choose_model
from nemo_lmpo.answers.identity import claim_folder
from nemo_lmpo.answers.judge import JudgeServer, parse_extra
from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.answers.sources import AnswerSource, EndpointSource
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate import alpaca_eval, arena_hard
from nemo_lmpo.evaluate.answers import StoredSource, choose, collect_answers
from nemo_lmpo.evaluate.answers import stored_answers as read_stored_answers
from nemo_lmpo.evaluate.data_files import (
    EvaluationSet,
    Instruction,
    JudgePrompt,
    data_folder,
    find_file,
    load_judge_prompt,
    load_own_questions,
    load_set,
    published_scores,
)
from nemo_lmpo.evaluate.environment import all_packages
from nemo_lmpo.evaluate.model import default_name, describe, parse_row, prompts_of
from nemo_lmpo.evaluate.result import (
    RESULT_FILE,
    SETTINGS_FILE,
    Judge,
    Model,
    Result,
    read_result,
    relabel,
    write_result,
)
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, GenerationSettings, generation_settings
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.runtime.credentials import require_variable_name
from nemo_lmpo.runtime.files import directory_lock

LOCK_SECONDS = 2.0
"""To wait for another evaluation of the same folder: one that was killed is gone by then."""
JUDGE_SETTINGS_FILE = "judge_settings.json"
_CHARACTERS_PER_TOKEN = 4
_MOST_UNPARSED = 0.01

_logger = logging.getLogger("nemo_lmpo")


@dataclass(frozen=True)
class PreparedEvaluation:
    """What is to be done, all cheap checks passed."""

    options: argparse.Namespace
    folder: Path
    data: Path
    set: EvaluationSet
    chosen: list[Instruction]
    model: Model
    source: AnswerSource
    judge: JudgeServer
    judge_prompt: JudgePrompt | None
    packages: Mapping[str, str]


def run(options: argparse.Namespace, command: str) -> Path:
    """Do what is missing of an evaluation; returns the folder with its `result.json`.

    Raises:
        UserError: names what is wrong; everything made so far is kept.
    """
    plan = prepare(options)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with directory_lock(plan.folder, patience=LOCK_SECONDS, option="--output "):
        return _run_alone(plan, command)


def _run_alone(plan: PreparedEvaluation, command: str) -> Path:
    options = plan.options
    claim_folder(plan.folder, SETTINGS_FILE, identity(plan))
    if (plan.folder / RESULT_FILE).exists() and _is_done(plan):
        relabel(plan.folder, plan.model)
        _logger.info("%s is complete; remove it to make it again", plan.folder / RESULT_FILE)
        return plan.folder
    answers = collect_answers(
        plan.chosen, plan.folder, plan.source, allow_empty=options.allow_empty, quiet=options.quiet
    )
    claim_folder(plan.folder, JUDGE_SETTINGS_FILE, judge_identity(plan))
    _logger.info("%s", estimate(plan, answers))
    _write(plan, answers, *_judge_and_score(plan, answers), command)
    return plan.folder


def prepare(options: argparse.Namespace) -> PreparedEvaluation:
    """Check everything that costs little, the judge's server included.

    Raises:
        UserError: names what is wrong.
    """
    extra = parse_extra(options.judge_extra)
    max_tokens = getattr(options, "judge_max_tokens", None)
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--judge-max-tokens {max_tokens} must be at least 1")
    versions = all_packages()
    data = data_folder(options.data)
    own = getattr(options, "questions", None)
    evaluation_set = load_set(options.command, data) if own is None else load_own_questions(own)
    chosen = choose(evaluation_set.instructions, options.limit)
    prompt = load_judge_prompt(data, options.judge_prompt) if options.command == ARENA_HARD else None
    judge_endpoint = open_endpoint("--judge-endpoint", options.judge_endpoint, options, options.judge_key)
    judge = JudgeServer(judge_endpoint, choose_model(judge_endpoint, options.judge, "--judge"), extra)
    folder = (options.output or Path("evals") / _name(options)) / options.command
    model, source = describe_source(options, data, evaluation_set, chosen, folder)
    return PreparedEvaluation(
        *(options, folder, data, evaluation_set, chosen, model, source),
        *(judge, prompt, versions),
    )


def open_endpoint(option: str, url: str, options: argparse.Namespace, variable: str) -> Endpoint:
    """A server as the options have it, with the key of an environment variable."""
    require_variable_name("--judge-key" if option.startswith("--judge") else "--key", variable)
    limits = Limits(options.concurrency, options.requests_per_minute, options.retries)
    return Endpoint(option, url, limits, key=os.environ.get(variable), key_variable=variable)


def _name(options: argparse.Namespace) -> str:
    return str(options.name or options.anchor or default_name(str(options.model or options.answers)))


def describe_source(
    options: argparse.Namespace, data: Path, evaluation_set: EvaluationSet, chosen: Sequence[Instruction], folder: Path
) -> tuple[Model, AnswerSource]:
    """Who answers, and what it is."""
    if options.anchor is not None:
        return anchor(options.anchor, data, evaluation_set)
    if options.answers is not None:
        row = parse_row(options.row) if options.row else ()
        stored = read_stored_answers(options.answers, evaluation_set)
        return Model(_name(options), str(options.answers), "answers", *row), stored
    return trained_model(options, evaluation_set, chosen, folder)


def anchor(name: str, data: Path, evaluation_set: EvaluationSet) -> tuple[Model, StoredSource]:
    """A model whose answers and published scores exist.

    Raises:
        DataError: its answers were not fetched.
        ConfigError: it is not on the public leaderboard.
    """
    suite = evaluation_set.suite
    prefix, ending = ("alpaca_eval2_answers_", "json") if suite == ALPACA_EVAL else ("arena_hard_v0.1_", "jsonl")
    path = find_file(data, f"{prefix}{name}.{ending}")
    published = published_scores(suite, data, name)
    if not published:
        raise ConfigError(f"--anchor {name} is not on the public leaderboard; give its answers with --answers")
    return Model(name, name, "anchor", published=published), read_stored_answers(path, evaluation_set)


def trained_model(
    options: argparse.Namespace, evaluation_set: EvaluationSet, chosen: Sequence[Instruction], folder: Path
) -> tuple[Model, AnswerSource]:
    """A model on disk, answering through a server or in this process."""
    path = find_model(options.model).path
    from nemo_lmpo.answers.engine import choose_device, open_prompting
    from nemo_lmpo.answers.in_process import InProcessSource, default_dtype

    prompting = open_prompting(path, chat_template=options.chat_template, system_prompt=options.system_prompt)
    model = describe(options, prompting, folder)
    prompts = prompts_of(prompting, chosen)
    settings = sampling(options, evaluation_set.suite, model.setting)
    if options.endpoint is None:
        device = choose_device(options.device)
        dtype = options.dtype or default_dtype(device)
        sampled = replace(sampling_of(settings, options.seed), batch_size=options.batch_size)
        return model, InProcessSource(prompting, prompts, sampled, device, dtype)
    endpoint = open_endpoint("--endpoint", options.endpoint, options, options.key)
    served = choose_model(endpoint, options.served_name, "--served-name")
    positions = prompting.files.architecture.max_position_embeddings
    requests = CompletionRequests(served, prompting.stop_ids, sampling_of(settings, options.seed))
    return model, EndpointSource(endpoint, prompts, requests, positions)


def sampling(options: argparse.Namespace, suite: str, setting: str | None) -> GenerationSettings:
    """The paper's settings, but for what the options say.

    Raises:
        ConfigError: a value that means nothing.
    """
    paper = generation_settings(suite, setting)
    given = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens, "top_p": options.top_p}
    settings = replace(paper, **{name: value for name, value in given.items() if value is not None})
    replace(sampling_of(settings, options.seed), batch_size=options.batch_size).validate()
    return settings


def sampling_of(settings: GenerationSettings, seed: int) -> Sampling:
    """A suite's settings with a seed."""
    return Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed=seed)


def identity(plan: PreparedEvaluation) -> dict[str, Any]:
    """What answers are made of; the same in every command that continues a folder."""
    hashes = (plan.model.weights_sha256, plan.model.template_sha256, plan.model.tokenizer_sha256)
    return {"evaluation set": plan.set.sha256, "model": hashes, "generation": lasting(plan.source.generation())}


def lasting(generation: Mapping[str, Any]) -> dict[str, Any]:
    """A generation's settings but for where its server was: every job has another port and path."""
    return {
        name: value
        for name, value in generation.items()
        if name not in ("endpoint", "served_name", "left to the server")
    }


def judge_identity(plan: PreparedEvaluation) -> dict[str, Any]:
    """What judgments are made of."""
    prompt = plan.judge_prompt.sha256 if plan.judge_prompt else alpaca_eval.PROMPT_NAME
    asked = {"judge max tokens": getattr(plan.options, "judge_max_tokens", None), "judge extra": plan.judge.extra}
    return {"judge": plan.judge.name, "judge prompt": prompt, **{name: value for name, value in asked.items() if value}}


def _is_done(plan: PreparedEvaluation) -> bool:
    before = read_result(plan.folder)
    return before.n >= len(plan.chosen) and before.judge is not None and before.judge.asked == plan.judge.name


def estimate(plan: PreparedEvaluation, answers: Mapping[str, Answer]) -> str:
    """Calls and tokens that judging takes at most, for the reader to stop in time."""
    options, arena = plan.options, plan.set.suite == ARENA_HARD
    texts = sum(len(one.text) + len(one.baseline_answer) + len(answers[one.id].text) for one in plan.chosen)
    # The instructions to the judge are about 2,000 characters.
    games = len(arena_hard.GAMES) if arena else 1
    calls = games * len(plan.chosen)
    tokens_in = (games * texts + 2000 * calls) / _CHARACTERS_PER_TOKEN
    tokens_out = calls * (arena_hard.TYPICAL_OUTPUT_TOKENS if arena else alpaca_eval.OUTPUT_TOKENS)
    line = (
        f"judge {plan.judge.name} at {plan.judge.endpoint.shown}: {calls} calls, about {tokens_in / 1e6:.2f} M tokens "
        f"in and {tokens_out / 1e6:.3f} M out"
    )
    if options.judge_price is not None:
        price_in, price_out = options.judge_price
        line += f", about ${tokens_in / 1e6 * price_in + tokens_out / 1e6 * price_out:.2f}"
    return f"{line}; calls made before are not made again"


def _judge_and_score(
    plan: PreparedEvaluation, answers: Mapping[str, Answer]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int, Judge]:
    """Values, details, numbers by instruction, judgments without a verdict, and who judged."""
    asked = (plan.chosen, answers, plan.folder, plan.judge)
    if plan.judge_prompt is not None:
        most = plan.options.judge_max_tokens or arena_hard.OUTPUT_TOKENS
        verdicts, judge = arena_hard.judge(*asked, plan.judge_prompt, max_tokens=most, quiet=plan.options.quiet)
        unparsed = count_unparsed(itertools.chain(*verdicts.values()), judge)
        return (*arena_hard.score(plan.chosen, answers, verdicts), unparsed, judge)
    preferences, judge = alpaca_eval.judge(*asked, quiet=plan.options.quiet)
    unparsed = count_unparsed(preferences.values(), judge)
    _logger.info("score: fitting the length-controlled win rate with its interval (about half a minute)")
    return (*alpaca_eval.score(plan.chosen, answers, preferences, plan.data, plan.options.bootstrap), unparsed, judge)


def count_unparsed(verdicts: Iterable[object], judge: Judge) -> int:
    """How many answers of the judge have no verdict, each None; those that it declined to give are among them.

    Raises:
        DataError: more than 1 %.
    """
    every = list(verdicts)
    unparsed = every.count(None)
    if unparsed > _MOST_UNPARSED * len(every):
        declined = f" ({judge.refused} of them it declined to give)" if judge.refused else ""
        raise DataError(
            f"the judge {judge.asked} gave no verdict in {unparsed} of {len(every)} answers{declined}, more than 1 %: "
            "its numbers would say little; choose another judge, or for one that thinks first more --judge-max-tokens"
        )
    return unparsed


def _write(
    plan: PreparedEvaluation,
    answers: Mapping[str, Answer],
    values: dict[str, Any],
    details: dict[str, Any],
    units: dict[str, Any],
    unparsed: int,
    judge: Judge,
    command: str,
) -> None:
    result = Result(
        suite=plan.set.suite,
        model=plan.model,
        values=values,
        n=len(plan.chosen),
        of=len(plan.set.instructions),
        unparsed=unparsed,
        truncated=sum(not answer.finished for answer in answers.values()),
        empty=sum(not answer.text.strip() for answer in answers.values()),
        judge=judge,
        generation=dict(plan.source.generation()),
        packages=plan.packages,
        evaluation_set={
            "name": plan.set.suite,
            "sha256": plan.set.sha256,
            "baseline": plan.set.baseline,
            "published": "yes" if plan.set.published else "no",
        },
        command=command,
        details=details,
    )
    write_result(plan.folder, result, units)
    for name, value in result.values.items():
        shown = (
            f" ({value.bootstrap_interval[0]:.1f} to {value.bootstrap_interval[1]:.1f})"
            if value.bootstrap_interval
            else ""
        )
        _logger.info("%s %.2f%s", name, value.value, shown)
