"""Rows with several answers of which each has a score or a rank: the best against the worst.

The highest score, or the lowest rank, is preferred to the lowest score, or the highest rank. Of answers that share the
best or the worst place the first is taken, as SimPO's script does (`argmax` and `argmin`), and the pair says so.
Answers without a score are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_lmpo.config.row_fields import ANSWER_LISTS, RANK_LISTS, SCORE_LISTS
from nemo_lmpo.data.messages import Message, RowError, is_list, is_message, kind
from nemo_lmpo.data.rows.pairs import pair_of
from nemo_lmpo.data.rows.prompts import PROMPT_FIELDS, answer_of, prompt_messages
from nemo_lmpo.data.rows.transcripts import awaits_answer
from nemo_lmpo.data.schema import PreferenceRow
from nemo_lmpo.errors import shown

_TEXTS = ("response", "answer", "completion", "text", "content", "output")
_SCORES = ("score", "overall_score", "rating", "reward")
TIED = "answers share the best or the worst place; the first of them is taken"
LEFT_OUT = "answers without a score are left out"


def ranked_field(row: Mapping[str, Any]) -> str | None:
    """The column that holds answers with scores or ranks; None if there is none."""
    name = next((name for name in ANSWER_LISTS if row.get(name) is not None), None)
    if name is None:
        return None
    beside = any(row.get(other) is not None for other in (*SCORE_LISTS, *RANK_LISTS))
    answers = _as_list(row[name], name)
    inside = is_list(answers) and any(
        isinstance(answer, Mapping) and any(answer.get(key) is not None for key in (*_SCORES, "rank"))
        for answer in answers
    )
    return name if beside or inside else None


def parse_ranked(row: Mapping[str, Any]) -> tuple[PreferenceRow, set[str]]:
    """The best answer against the worst, and the columns that the pair was made of.

    Raises:
        RowError: the row cannot be used, or its answers all have the same score.
    """
    name = next((name for name in ANSWER_LISTS if row.get(name) is not None), None)
    if name is None:
        raise RowError("missing field", f"there is no field of {', '.join(ANSWER_LISTS)} (fields: {shown(list(row))})")
    answers = _as_list(row[name], name)
    if not is_list(answers):
        raise RowError("not answers", f"the field '{name}' is {kind(answers)}, not a list of answers")
    prompt, used = prompt_messages(row)
    values, source = _values(row, name, answers)
    best, worst, notes = _best_and_worst(name, values)
    transcript = any(awaits_answer(row.get(field)) for field in PROMPT_FIELDS)
    chosen, rejected = (_message(answers[place], name, place, prompt, transcript) for place in (best, worst))
    pair = pair_of(prompt, chosen, rejected)
    columns = {name, *used, *([source] if source else [])}
    return PreferenceRow(**{**vars(pair), "notes": notes}), columns


def _as_list(value: Any, name: str) -> Any:
    """A list, also as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("broken JSON", f"the text of '{name}' is not JSON: {shown(value)}") from None
    return value


def _values(row: Mapping[str, Any], name: str, answers: Sequence[Any]) -> tuple[list[float | None], str | None]:
    """How good each answer is, more being better, and the column that says it (None: the answers say it)."""
    for source in (*SCORE_LISTS, *RANK_LISTS):
        if row.get(source) is None:
            continue
        given = _as_list(row[source], source)
        if not is_list(given) or len(given) != len(answers):
            count = len(given) if is_list(given) else kind(given)
            raise RowError("not scores", f"'{source}' is not one number for each of the {len(answers)} {name}: {count}")
        sign = -1 if source in RANK_LISTS else 1
        return [_number(value, source, sign) for value in given], source
    for key in (*_SCORES, "rank"):
        if any(isinstance(answer, Mapping) and answer.get(key) is not None for answer in answers):
            found = [answer.get(key) if isinstance(answer, Mapping) else None for answer in answers]
            return [_number(value, key, -1 if key == "rank" else 1) for value in found], None
    names = ", ".join((*SCORE_LISTS, *RANK_LISTS))
    raise RowError("not scores", f"nothing says which of the {name} is better; give one of {names} beside them")


def _number(value: Any, name: str, sign: int) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowError("not scores", f"'{name}' holds {shown(value)}, which is not a number") from None
    return sign * number if math.isfinite(number) else None


def _best_and_worst(name: str, values: list[float | None]) -> tuple[int, int, tuple[str, ...]]:
    known = [(value, place) for place, value in enumerate(values) if value is not None]
    if len(known) < 2:
        raise RowError("not scores", f"{len(known)} of the {len(values)} {name} have a score; a pair needs two")
    best, worst = max(value for value, _ in known), min(value for value, _ in known)
    if best == worst:
        raise RowError("equal scores", f"all {name} have the same score, so that none is better")
    first = {extreme: [place for value, place in known if value == extreme] for extreme in (best, worst)}
    notes = [TIED] if any(len(places) > 1 for places in first.values()) else []
    notes += [LEFT_OUT] if len(known) < len(values) else []
    return first[best][0], first[worst][0], tuple(notes)


def _message(answer: Any, name: str, place: int, prompt: list[Message], transcript: bool) -> Message:
    """An answer, be it a text, a message, messages behind the prompt or an object with a text, as a message."""
    where = f"{name}[{place}]"
    if isinstance(answer, Mapping) and not is_message(answer):
        key = next((key for key in _TEXTS if answer.get(key) is not None), None)
        if key is None:
            raise RowError("missing field", f"'{where}' has no field of {', '.join(_TEXTS)}: {shown(list(answer))}")
        where, answer = f"{where}.{key}", answer[key]
    messages = answer_of(answer, where, transcript=transcript)
    if messages[:-1] not in ([], prompt):
        raise RowError("prompts differ", f"'{where}' does not begin with the messages of the prompt")
    return messages[-1]
