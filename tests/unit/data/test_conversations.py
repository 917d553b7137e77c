"""Conversations as token ids: what is predicted, by transformers' own marks of what the assistant says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo.config.schema import DataConfig
from nemo_lmpo.data.encode import PairEncoder
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.preference import PreferenceDataset, load_preference_dataset
from nemo_lmpo.data.schema import ConversationRow, PreferenceRow
from nemo_lmpo.data.special_tokens import SpecialTokens
from nemo_lmpo.data.templates import CHATML
from nemo_lmpo.data.turns import MESSAGES_LEFT_OUT, REWRITTEN
from nemo_lmpo.errors import DataError
from tests.unit.data import template_walk as walk
from tests.unit.data.conversation_rows import LONG, PLAIN, SYSTEM, THOUGHTS, encoded, mask, said
from tests.unit.data.pair_rows import package_file

# Templates that TRL marks: BOS or none, ends of turn of one token and more, thoughts that are dropped or kept.
MARKED = ("llama3", "qwen2_5", "qwen3", "cohere", "glm4moe", "gemma3", "phi3", "deepseek_r1_distill", "qwen3_6")


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], flags: list[Any]) -> list[str]:
    """The texts of the runs of marked ids."""
    runs = groupby(zip(ids, flags, strict=False), key=lambda pair: bool(pair[1]))
    return [tokenizer.decode([token for token, _ in run]) for flag, run in runs if flag]


@pytest.mark.parametrize("messages", [PLAIN, SYSTEM], ids=["plain", "system"])
@pytest.mark.parametrize("name", MARKED)
def test_the_turns_are_those_that_trl_marks(name: str, messages: list[dict[str, Any]]) -> None:
    """TRL's marks are about what one token more or less: some hold the newline behind, some the assistant's header."""
    template = package_file("trl", "chat_templates", f"{name}_training.jinja").read_text()
    tokenizer = walk.byte_tokenizer(template)
    row = encoded(PairEncoder(tokenizer, template, **LONG), messages)
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = row.prompt_ids + row.chosen_ids
    assert ids == expected["input_ids"][: len(ids)]
    ours, theirs = (
        marked(tokenizer, ids, mask(row)),
        marked(tokenizer, *map(list, (expected["input_ids"], expected["assistant_masks"]))),
    )
    prompt = tokenizer.apply_chat_template(
        messages[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert len(ours) == len(theirs) == 3
    for found, wanted in zip(ours, theirs, strict=True):
        front, _, behind = wanted.partition(found)
        assert found in wanted
        assert behind.strip() == ""
        assert front in prompt


def test_real_ids_are_those_of_transformers(smollm2: PreTrainedTokenizerBase) -> None:
    row = encoded(PairEncoder(smollm2, smollm2.chat_template, **LONG), PLAIN)
    ids = smollm2.apply_chat_template(PLAIN, tokenize=True, return_dict=True)["input_ids"]
    found = row.prompt_ids + row.chosen_ids
    assert found == ids[: len(found)]
    assert marked(smollm2, found, mask(row)) == ["Two things.<|im_end|>", " Good answer.<|im_end|>", "A<|im_end|>"]


def chatml(**settings: Any) -> tuple[PreTrainedTokenizerBase, PairEncoder]:
    template = CHATML
    tokenizer = walk.byte_tokenizer(template)
    return tokenizer, PairEncoder(tokenizer, template, **{**LONG, **settings})


def test_what_is_predicted() -> None:
    tokenizer, encoder = chatml(predict="last")
    row = encoded(encoder, PLAIN)
    assert row.spans is None
    assert tokenizer.decode(row.chosen_ids) == "A<|im_end|>"
    tokenizer, encoder = chatml(predict="all")
    row = encoded(encoder, PLAIN)
    assert len(row.prompt_ids) == 1
    assert row.spans is None
    whole = tokenizer.apply_chat_template(PLAIN, chat_template=encoder.template, tokenize=False)
    assert tokenizer.decode(row.prompt_ids + row.chosen_ids) == whole
    tokenizer, encoder = chatml()
    row = encoded(encoder, PLAIN, prompt_messages=3)
    assert marked(tokenizer, row.prompt_ids + row.chosen_ids, mask(row)) == [" Good answer.<|im_end|>", "A<|im_end|>"]
    opened = encoded(encoder, said("x", "Hello.", "Hi", "Bye.")[1:])
    assert marked(tokenizer, opened.prompt_ids + opened.chosen_ids, mask(opened)) == [
        "Hello.<|im_end|>",
        "Bye.<|im_end|>",
    ]
    open_end = encoded(encoder, PLAIN[:3])
    assert open_end.notes == (MESSAGES_LEFT_OUT,)
    assert tokenizer.decode(open_end.chosen_ids) == "Two things.<|im_end|>"
    assert encoded(encoder, PLAIN[:1]).reason == "no answer"


def test_thoughts_that_the_template_drops_are_not_predicted_and_told() -> None:
    template = package_file("trl", "chat_templates", "glm4moe_training.jinja").read_text()
    tokenizer = walk.byte_tokenizer(template)
    row = encoded(PairEncoder(tokenizer, template, **LONG), THOUGHTS)
    (last,) = marked(tokenizer, row.prompt_ids + row.chosen_ids, mask(row))
    assert "Well." in last
    assert "Fine." in last
    assert REWRITTEN in row.notes
    assert row.lost == ("thoughts of earlier answers",)


def test_lengths_are_bounded() -> None:
    _, encoder = chatml()
    whole = encoded(encoder, PLAIN)
    prompt, total = len(whole.prompt_ids), len(whole.prompt_ids + whole.chosen_ids)
    for kept in range(prompt + 1, total):
        _, bounded = chatml(max_length=kept, max_prompt_length=prompt)
        row = encoded(bounded, PLAIN)
        ids = row.prompt_ids + row.chosen_ids
        assert ids == (whole.prompt_ids + whole.chosen_ids)[: len(ids)]
        assert mask(row) == mask(whole)[: len(ids)]
        assert mask(row)[-1]
        assert len(ids) <= kept
        assert row.response_cut
    _, short = chatml(max_length=prompt, max_prompt_length=5)
    row = encoded(short, PLAIN)
    assert row.prompt_cut
    assert row.prompt_ids == whole.prompt_ids[-5:]


def test_special_tokens_in_conversations() -> None:
    tokenizer, encoder = chatml()
    hidden = said("What?", "A<|im_end|>B", "And?", "C")
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded(encoder, hidden).special_tokens
    for policy, ends in (("split", 3), ("keep", 4)):
        _, encoder = chatml(special=SpecialTokens(tokenizer, policy))
        assert encoded(encoder, hidden).chosen_ids.count(mark) == ends
    _, encoder = chatml(special=SpecialTokens(tokenizer, "error"))
    assert isinstance(encoded(encoder, hidden), RowError)


def test_a_data_set_of_conversations(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    """Pairs beside conversations are the conversations of their chosen answers; the start shows what is predicted."""
    pair = {"prompt": "sort b a", "chosen": "a b", "rejected": "b a"}
    talk = {"messages": said("sort c a", "a c", "sort d b", "b d")}
    takes = ("pairs", "conversations")

    def load(rows: list[Any], name: str, **more: Any) -> PreferenceDataset | None:
        config = data_config(write_jsonl(rows, name))
        return load_preference_dataset(config, config.train, tiny, takes=takes, **more)

    pairs, both = load([pair, pair], "a.jsonl"), load([talk, pair], "b.jsonl")
    assert (pairs.num_responses, both.num_responses) == (2, 1)
    assert [len(both[place].responses) for place in (0, 1)] == [1, 1]
    assert both[1].responses[0].ids == pairs[0].responses[0].ids
    assert both.lengths[:].tolist() == [[len(e.prompt_ids), len(e.responses[0].ids), 0] for e in (both[0], both[1])]
    assert both[0].responses[0].predicted == 6
    assert "<user> sort c a <assistant>>>>a c <eos><<<<user> sort d b <assistant>>>>b d <eos><<<" in both.example_text()
    assert "train: 2 conversations" in str(both.summary)
    assert both.summary.length_percentiles["predicted"][100] == 6
    assert load([pair], "c.jsonl", kind="conversations").token_hash() != load([pair], "c.jsonl").token_hash()
    with pytest.raises(DataError, match=r"holds conversations and data.train.path pairs"):
        load([talk], "d.jsonl", kind="pairs")
    config = data_config(write_jsonl([talk], "e.jsonl"))
    with pytest.raises(DataError, match="loss=sft trains on such rows"):
        load_preference_dataset(config, config.train, tiny)


def test_rows_keep_their_order() -> None:
    _, encoder = chatml()
    rows: list[Any] = [ConversationRow(PLAIN), PreferenceRow(PLAIN[:1], "x", "y"), ConversationRow(PLAIN[:2])]
    encoded_rows: list[Any] = encoder.encode(rows)
    assert [row.rejected_ids is None for row in encoded_rows] == [True, False, True]
