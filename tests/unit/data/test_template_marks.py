"""Templates with `{% generation %}` marks: what `data.predict=marked` takes is transformers' mask, to the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.data.encode import PairEncoder
from nemo_lmpo.data.marks import MARKS_HOLD_LESS, MARKS_HOLD_MORE, differences
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.templates import CHATML
from nemo_lmpo.errors import ConfigError
from tests.unit.data import template_walk as walk
from tests.unit.data.conversation_rows import LONG, PLAIN, SYSTEM, THOUGHTS, encoded, mask, said
from tests.unit.data.pair_rows import package_file

CASES = {"plain": PLAIN, "system": SYSTEM, "thoughts": THOUGHTS}
PICTURES = ("idefics3", "llava_next", "smolvlm")
"""They render content in parts only, and none of a text."""
NO_SYSTEM = ("gemma",)
BODY = "{{ message['content'] + '<|im_end|>' }}"


def trl_templates() -> list[Path]:
    folder = package_file("trl", "chat_templates", "llama3_training.jinja").parent
    return sorted(folder.glob("*_training.jinja"))


def masked(tokenizer: Any, template: Any, messages: Any) -> Any:
    """Ids and mask of transformers."""
    found = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], [bool(flag) for flag in found["assistant_masks"]]


def test_marked_tokens_are_those_of_transformers_with_every_template_of_trl() -> None:
    """And where the turns are predicted, a difference of more than blanks is told, and only such a one."""
    tried = told = 0
    for path in trl_templates():
        name, template = path.stem.removesuffix("_training"), path.read_text()
        if name in PICTURES:
            continue
        tokenizer = walk.byte_tokenizer(template)
        by_marks, by_turns = (PairEncoder(tokenizer, template, **LONG, predict=p) for p in ("marked", "assistant"))
        for case, messages in CASES.items():
            if name in NO_SYSTEM and case == "system":
                continue
            ids, flags = masked(tokenizer, template, messages)
            row = encoded(by_marks, messages)
            found = row.prompt_ids + row.chosen_ids
            assert found == ids[: len(found)], (name, case)
            assert mask(row) == flags[: len(found)], (name, case)
            assert not any(flags[len(found) :]), (name, case)
            tried += 1
            turns = encoded(by_turns, messages)
            if isinstance(turns, RowError):
                assert (name, case) == ("deepseekv3", "thoughts")
                continue
            predicted = mask(turns) + [False] * (len(ids) - len(mask(turns)))
            more, less = (
                bool(tokenizer.decode([i for i, a, b in zip(ids, one, other, strict=True) if a and not b]).strip())
                for one, other in ((flags, predicted), (predicted, flags))
            )
            assert [more, less] == [note in turns.notes for note in (MARKS_HOLD_MORE, MARKS_HOLD_LESS)], (name, case)
            told += more
    assert tried > 80
    assert 20 < told < tried - 20


def marked_chatml(marked: str) -> str:
    """ChatML with an answer as ``marked`` writes it."""
    plain = "{% if message['role'] == 'assistant' %}" + marked + "{% else %}" + BODY + "{% endif %}"
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}" + plain + "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def test_marks_of_ones_own() -> None:
    tokenizer = walk.byte_tokenizer(CHATML)
    agrees = marked_chatml("{% generation %}" + BODY + "{% endgeneration %}")
    row = encoded(PairEncoder(tokenizer, agrees, **LONG), PLAIN)
    assert not set(row.notes) & {MARKS_HOLD_LESS, MARKS_HOLD_MORE}
    assert encoded(PairEncoder(tokenizer, agrees, **LONG, predict="marked"), PLAIN).spans == row.spans
    answered = encoded(PairEncoder(tokenizer, agrees, **LONG, predict="marked"), PLAIN, prompt_messages=5)
    assert tokenizer.decode(answered.chosen_ids) == "A<|im_end|>"
    assert answered.spans is None

    endless = marked_chatml("{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>")
    assert MARKS_HOLD_LESS in encoded(PairEncoder(tokenizer, endless, **LONG), PLAIN).notes
    first = encoded(PairEncoder(tokenizer, endless, **LONG, predict="marked"), PLAIN[:2])
    assert tokenizer.decode(first.chosen_ids) == "Two things."

    last_only = marked_chatml(
        "{% if loop.last %}{% generation %}" + BODY + "{% endgeneration %}{% else %}" + BODY + "{% endif %}"
    )
    assert MARKS_HOLD_LESS in encoded(PairEncoder(tokenizer, last_only, **LONG), PLAIN).notes
    chosen = encoded(PairEncoder(tokenizer, last_only, **LONG, predict="marked"), PLAIN)
    assert tokenizer.decode(chosen.chosen_ids) == "A<|im_end|>"


def test_marks_that_are_not_there() -> None:
    tokenizer = walk.byte_tokenizer(CHATML)
    with pytest.raises(ConfigError, match=r"data.predict=marked .* this one marks nothing; set data.predict=assistant"):
        PairEncoder(tokenizer, CHATML, **LONG, predict="marked")
    never = marked_chatml(
        "{% if 'secret' in message['content'] %}{% generation %}x{% endgeneration %}{% endif %}" + BODY
    )
    row = encoded(PairEncoder(tokenizer, never, **LONG, predict="marked"), PLAIN)
    assert isinstance(row, RowError)
    assert row.reason == "refused by the chat template"
    assert "marks no answer" in row.detail


def test_marks_with_real_tokens(smollm2: Any) -> None:
    template = marked_chatml("{% generation %}" + BODY + "{% endgeneration %}")
    ids, flags = masked(smollm2, template, said("Näher zu 12?", " 12 or\n 13", "Und?", "Ja."))
    row = encoded(
        PairEncoder(smollm2, template, **LONG, predict="marked"), said("Näher zu 12?", " 12 or\n 13", "Und?", "Ja.")
    )
    found = row.prompt_ids + row.chosen_ids
    assert found == ids[: len(found)]
    assert mask(row) == flags[: len(found)]


@pytest.mark.parametrize(
    ("turns", "marked", "notes"),
    [
        ([(2, 6)], [(2, 6)], []),
        ([(2, 6)], [(1, 7)], []),  # blanks
        ([(2, 6)], [(0, 6)], [MARKS_HOLD_MORE]),
        ([(2, 6)], [(2, 4), (5, 6)], [MARKS_HOLD_LESS]),
        ([(2, 6)], [(0, 4)], [MARKS_HOLD_MORE, MARKS_HOLD_LESS]),
        ([(2, 6)], [], [MARKS_HOLD_LESS]),
        ([(2, 4), (4, 6)], [(2, 6)], []),
    ],
)
def test_differences(turns: Any, marked: Any, notes: Any) -> None:
    assert differences("a bcde f", turns, marked) == notes
