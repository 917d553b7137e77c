"""The command from beginning to end: sample, score, choose. Each stage resumes from what is there."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_lmpo.answers.identity import own_packages
from nemo_lmpo.errors import ConfigError, DataError, counted
from nemo_lmpo.formats.public_names import public_name
from nemo_lmpo.pairs import folder as files
from nemo_lmpo.pairs.choose import Chosen, choose_pairs, row_of
from nemo_lmpo.pairs.models import HowToLoad, SampledModel, open_model
from nemo_lmpo.pairs.options import CHOOSE, SAMPLE, SCORE, checked_counts, sampling_of
from nemo_lmpo.pairs.prompts import AskedPrompts, read_source
from nemo_lmpo.pairs.rules import Rule, parse_rule
from nemo_lmpo.pairs.sample import SamplePlan, collect_candidates, seeds_for
from nemo_lmpo.pairs.score import Scorer, collect_scores
from nemo_lmpo.pairs.scorer_choice import check_one_scorer, choose_scorer, open_endpoint
from nemo_lmpo.pairs.statistics import statistics_of
from nemo_lmpo.runtime.files import content_hash, directory_lock, file_hash, read_json, replace_file, write_json

LOCK_SECONDS = 1.0
"""That a command waits for another one of the same folder: one that was killed is gone by then."""
FORMAT = 1

_logger = logging.getLogger("nemo_lmpo")


def make_pairs(options: argparse.Namespace) -> Path:
    """Do what is missing; the folder.

    Raises:
        UserError: names what is wrong; everything made so far is kept.
    """
    counts, sampling = checked_counts(options), sampling_of(options)
    rule = parse_rule(options.rule, options.max_length_ratio, options.rule_seed)
    if options.until != SAMPLE:
        check_one_scorer(options)
    seeds = options.seeds or seeds_for(counts.samples)
    if len(seeds) * len(options.model) < 2:
        raise ConfigError("--samples 1 of one model gives fewer than two answers, and no pairs; ask for 2 or more")
    asked = read_source(
        options.prompts, options.split, options.prompt_field, counts.limit, skip_bad=options.skip_bad_rows
    )
    folder: Path = options.output
    work = folder / files.WORK
    _make(work, folder)
    with directory_lock(folder, patience=LOCK_SECONDS, option="--output "):
        left_out: Counter[str] = Counter()
        how = HowToLoad(
            sampling, options.chat_template, options.system_prompt, options.device, options.dtype, options.quiet
        )
        servers = _servers(options)
        models = [
            open_model(given, place, asked.prompts, work, how, servers[place], left_out)
            for place, given in enumerate(options.model)
        ]
        plan = SamplePlan(asked.prompts, asked.sha256, models, seeds)
        _run_stages(options, plan, rule, asked, left_out)
    return folder


def _make(work: Path, folder: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be made ({error.strerror}); choose another one") from None


def _servers(options: argparse.Namespace) -> list[Any]:
    """A server and a name there for each model; None: it runs in this process."""
    urls, names, models = options.endpoint or [], options.served_name or [], options.model
    if not urls:
        return [None] * len(models)
    if len(urls) != len(models) or len(names) not in (0, len(models)):
        raise ConfigError(
            f"{len(models)} --model have {len(urls)} --endpoint and {len(names)} --served-name; give one of each for "
            "every model, in the same order"
        )
    return [
        (open_endpoint("--endpoint", url, options, "key"), names[place] if names else None)
        for place, url in enumerate(urls)
    ]


def _run_stages(
    options: argparse.Namespace, plan: SamplePlan, rule: Rule, asked: AskedPrompts, not_asked: Counter[str]
) -> None:
    folder: Path = options.output
    work = folder / files.WORK
    # Before the first sample: what is wrong with a scorer is told now, not after hours of sampling.
    scorer = None if options.until == SAMPLE else choose_scorer(options, asked.prompts, work)
    answered = collect_candidates(plan, work, quiet=options.quiet)
    if scorer is None:
        _logger.info("sampled: %s", work / files.SAMPLES)
        return
    scored = collect_scores(answered, scorer, work, quiet=options.quiet)
    if options.until == SCORE:
        _logger.info("scored: %s", work / files.SCORES)
        return
    assert options.until == CHOOSE
    made_of = content_hash(
        json.loads(json.dumps([plan.identity(), scorer.identity(), _rule(options, rule), options.format, FORMAT]))
    )
    complete = _is_complete(folder, options.format, made_of)
    if complete and not options.push_to_hub:
        _logger.info("%s is complete; remove it to choose again", folder / files.SUMMARY)
        return
    chosen = choose_pairs(scored, rule, length_control=options.length_control)
    if complete:  # but its card may not have the name on the hub
        _describe(folder, options, read_json(folder / files.SUMMARY), chosen)
        return
    summary = _summary(options, plan, scorer, rule, asked, not_asked, chosen)
    write_pairs(folder, options, chosen, [model["name"] for model in summary["models"]])
    _describe(folder, options, summary, chosen)
    written = file_hash(files.pairs_file(folder, options.format))
    write_json(folder / files.SUMMARY, {**summary, "made_of": made_of, "pairs_sha256": written})
    _say(folder, options, summary)


def _rule(options: argparse.Namespace, rule: Rule) -> dict[str, Any]:
    seed = rule.seed if rule.text == "best-random" else None
    return {
        "text": rule.text,
        "max_length_ratio": rule.max_length_ratio,
        "length_control": bool(options.length_control),
        "seed": seed,
    }


def _is_complete(folder: Path, form: str, made_of: str) -> bool:
    """Whether the pairs of just these settings lie there."""
    path, summary = files.pairs_file(folder, form), folder / files.SUMMARY
    if not (path.is_file() and summary.is_file()):
        return False
    try:
        found = read_json(summary)
    except DataError:
        return False
    return isinstance(found, dict) and found.get("made_of") == made_of and found.get("pairs_sha256") == file_hash(path)


def _summary(
    options: argparse.Namespace,
    plan: SamplePlan,
    scorer: Scorer,
    rule: Rule,
    asked: AskedPrompts,
    not_asked: Counter[str],
    chosen: Chosen,
) -> dict[str, Any]:
    first = plan.models[0].identity()
    return {
        "format": FORMAT,
        "models": [_model(model) for model in plan.models],
        "prompts": {"source": public_name(options.prompts), "split": options.split, "sha256": asked.sha256},
        "sampling": {name: value for name, value in first.items() if name not in ("weights", "template", "tokenizer")},
        "seeds": list(plan.seeds),
        "scores": dict(scorer.identity()),
        "rule": _rule(options, rule),
        "counts": {
            "prompts": len(asked.prompts),
            "answers": _answers(plan),
            "pairs": len(chosen.pairs),
            "rows_left_out": dict(asked.left_out),
            "prompts_not_asked": dict(not_asked),
            "prompts_left_out": dict(chosen.prompts_left_out),
            "answers_left_out": {why: count for why, count in chosen.answers_left_out.items() if count},
        },
        "statistics": statistics_of(chosen),
        "packages": own_packages(),
    }


def _answers(plan: SamplePlan) -> int:
    return sum(len(model.prompts) for model in plan.models) * len(plan.seeds)


def _model(model: SampledModel) -> Mapping[str, Any]:
    identity = model.identity()
    return {
        "name": model.name or public_name(model.given),
        "weights_sha256": model.weights_sha256,
        "template_sha256": identity["template"],
        "tokenizer_sha256": identity["tokenizer"],
    }


def write_pairs(folder: Path, options: argparse.Namespace, chosen: Chosen, models: Sequence[str]) -> None:
    """Write the pairs whole or not at all; of another format, what an earlier command left is removed."""
    rows = [row_of(pair, models) for pair in chosen.pairs]
    # Prompts of one and of several messages cannot share a column of a table.
    if len({type(row["prompt"]) for row in rows}) > 1:
        rows = [_as_messages(row) for row in rows]
    path = files.pairs_file(folder, options.format)
    (folder / files.SUMMARY).unlink(missing_ok=True)
    for form in files.FORMATS:
        if form != options.format:
            files.pairs_file(folder, form).unlink(missing_ok=True)
    if options.format == "jsonl":
        replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    import io

    import datasets

    content = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(content)
    replace_file(path, content.getvalue())


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["prompt"], str):
        return row
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def _describe(folder: Path, options: argparse.Namespace, summary: Mapping[str, Any], chosen: Chosen) -> None:
    from nemo_lmpo.pairs.card import write_card
    from nemo_lmpo.pairs.page import write_page

    name = folder.resolve().name
    pictures = write_page(folder, name, summary, chosen)
    write_card(folder, options.push_to_hub or name, options.format, summary, pictures)


def _say(folder: Path, options: argparse.Namespace, summary: Mapping[str, Any]) -> None:
    counts, numbers = summary["counts"], summary["statistics"]
    for name in ("rows_left_out", "prompts_not_asked", "prompts_left_out", "answers_left_out"):
        for why, count in counts[name].items():
            _logger.info("%s: %d left out, %s", name.partition("_")[0], count, why)
    longer = numbers["longer_wins_pairs"]
    _logger.info(
        "%s: %s; the chosen answer is the longer one in %.0f %% of them (tokens %.1f and %.1f); page: %s",
        files.pairs_file(folder, options.format),
        counted(counts["pairs"], "pair"),
        longer if longer is not None else float("nan"),
        numbers["tokens_chosen"],
        numbers["tokens_rejected"],
        folder / files.PAGE,
    )
