"""The third stage: pairs of candidates by their scores, and a count of everything that is in none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_lmpo.errors import DataError
from nemo_lmpo.pairs.candidate import NO_SCORE, Answered, AskedPrompt, Candidate
from nemo_lmpo.pairs.length_control import LengthControl, fit
from nemo_lmpo.pairs.rules import Rule

TOO_FEW = "fewer than two usable answers"
ALL_EQUAL = "all answers equal"


@dataclass(frozen=True)
class Pair:
    """A pair as it is trained on."""

    prompt: AskedPrompt
    chosen: Candidate
    rejected: Candidate
    candidates: Sequence[Candidate]
    """All of the prompt."""
    place: int = 0
    """Among the pairs of its prompt."""


@dataclass(frozen=True)
class Chosen:
    """All pairs, and what is in none."""

    pairs: list[Pair]
    scored: list[list[Candidate]]
    """Candidates that could be in a pair, of each prompt with two or more."""
    answers_left_out: Counter[str] = field(default_factory=Counter)
    prompts_left_out: Counter[str] = field(default_factory=Counter)
    control: LengthControl | None = None


def choose_pairs(answered: Sequence[Answered], rule: Rule, *, length_control: bool) -> Chosen:
    """Apply the rule to every prompt.

    Raises:
        DataError: not one pair is left; says why.
    """
    answers: Counter[str] = Counter()
    prompts: Counter[str] = Counter()
    usable = [_scored(one, answers, prompts) for one in answered]
    scored = [them for them in usable if them]
    control = fit([_lengths_and_scores(them) for them in scored]) if length_control else None
    pairs, shown = [], []
    for one, candidates in zip(answered, usable, strict=True):
        if not candidates:
            continue
        them = candidates if control is None else controlled(candidates, control)
        shown.append(them)
        found, why = rule.pairs(one.prompt.id, them)
        if why is not None:
            prompts[why] += 1
        pairs += [Pair(one.prompt, best, worst, one.candidates, place) for place, (best, worst) in enumerate(found)]
    chosen = Chosen(pairs, shown, answers, prompts, control)
    if not pairs:
        raise DataError(f"not one pair is left of {len(answered)} prompts ({_reasons(chosen)}); look at the answers")
    return chosen


def _reasons(chosen: Chosen) -> str:
    prompts = ", ".join(f"{count} prompts: {why}" for why, count in chosen.prompts_left_out.most_common())
    answers = ", ".join(f"{count} answers {why}" for why, count in chosen.answers_left_out.most_common())
    return "; ".join(filter(None, (prompts, answers)))


def _scored(one: Answered, answers: Counter[str], prompts: Counter[str]) -> list[Candidate]:
    """Candidates that can be in a pair; none if there are fewer than two."""
    usable = one.usable(answers)
    if len(usable) == 1 and len({each.text.strip() for each in one.candidates}) == 1 and len(one.candidates) > 1:
        prompts[ALL_EQUAL] += 1
        return []
    if len(usable) < 2:
        prompts[TOO_FEW] += 1
        return []
    scored = [candidate for candidate in usable if candidate.score is not None]
    answers[NO_SCORE] += len(usable) - len(scored)
    if len(scored) < 2:
        prompts[TOO_FEW] += 1
        return []
    return scored


def _lengths_and_scores(candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
    return [float(one.tokens) for one in candidates], [float(one.score or 0.0) for one in candidates]


def controlled(candidates: Sequence[Candidate], control: LengthControl) -> list[Candidate]:
    """One prompt's candidates with scores that length explains nothing of."""
    removed = control.removed([one.tokens for one in candidates])
    return [
        replace(one, controlled=float((one.score or 0.0) - taken))
        for one, taken in zip(candidates, removed, strict=True)
    ]


def row_of(pair: Pair, models: Sequence[str]) -> dict[str, Any]:
    """A line of the output.

    `prompt`, `chosen` and `rejected` are what training reads; texts where the prompt is one message, else messages.
    """
    given = pair.prompt.given
    as_text = isinstance(given, str)
    answers = {
        name: one.text if as_text else [{"role": "assistant", "content": one.text}]
        for name, one in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    inputs = pair.prompt.inputs
    # As texts: tools of different rows have different fields, and a table's column has one type.
    more = {
        name: json.dumps(value, ensure_ascii=False) if value else None
        for name, value in (("tools", inputs.tools), ("chat_template_kwargs", dict(inputs.options)))
    }
    return {
        "prompt_id": pair.prompt.id if pair.place == 0 else f"{pair.prompt.id}-{pair.place + 1}",
        "prompt": given,
        **answers,
        **{name: value for name, value in more.items() if value},
        **{f"score_{name}": one.score for name, one in (("chosen", pair.chosen), ("rejected", pair.rejected))},
        **{f"tokens_{name}": one.tokens for name, one in (("chosen", pair.chosen), ("rejected", pair.rejected))},
        "candidates": [_candidate(one, models) for one in pair.candidates],
    }


def _candidate(one: Candidate, models: Sequence[str]) -> dict[str, Any]:
    return {
        "model": models[one.model],
        "seed": one.seed,
        "text": one.text,
        "tokens": one.tokens,
        "finished": one.finished,
        "score": one.score,
    }
