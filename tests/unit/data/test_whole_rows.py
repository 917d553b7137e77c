"""Nothing of a row is left out silently: whole messages reach the template, and what it does not render is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo.config.schema import DataConfig
from nemo_lmpo.data.encode import EncodedRow, PairEncoder
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.preference import load_preference_dataset
from nemo_lmpo.data.raw import raw_rows
from nemo_lmpo.data.rows.parse import parse_preference
from nemo_lmpo.data.templates import CHATML
from nemo_lmpo.errors import DataError
from tests.unit.data.template_walk import byte_tokenizer, templates_in

USER = {"role": "user", "content": "Rome?"}
CALLS = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def said(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


HISTORY = [USER, said("", tool_calls=CALLS), {"role": "tool", "name": "get_weather", "content": "sunny"}]
ROWS: dict[str, dict[str, Any]] = {
    "call": {"prompt": [USER], "chosen": [said(None, tool_calls=CALLS)], "rejected": said("No idea."), "tools": [TOOL]},
    "text and call": {
        "prompt": [USER],
        "chosen": said("I look.", tool_calls=CALLS),
        "rejected": "I look.",
        "tools": [TOOL],
    },
    "result": {"prompt": HISTORY, "chosen": "It is sunny.", "rejected": "It rains.", "tools": [TOOL]},
    "thought": {
        "prompt": [USER],
        "chosen": said("Yes", reasoning_content="It is in Italy."),
        "rejected": said("No", reasoning_content="A guess."),
    },
    "variable": {
        "prompt": "Rome?",
        "chosen": "Yes",
        "rejected": "No",
        "chat_template_kwargs": {"enable_thinking": False},
    },
}


@pytest.fixture(scope="module")
def templates() -> dict[str, str]:
    trl = pytest.importorskip("trl")
    return templates_in(Path(trl.__file__).parent / "chat_templates")


def encoder(template: str) -> tuple[PreTrainedTokenizerBase, Any]:
    """The second is a pair encoder; what it gives may be a row or why there is none, which a test knows."""
    tokenizer = byte_tokenizer(template)
    return tokenizer, PairEncoder(tokenizer, template, max_length=9000, max_prompt_length=8000)


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "gptoss", "glm4moe", "llama3_1", "nemotron_3_nano"])
def test_pairs_are_what_transformers_renders_of_whole_messages(templates: dict[str, str], name: str, case: str) -> None:
    template, row = templates[name], ROWS[case]
    tokenizer, pairs = encoder(template)
    (encoded,) = pairs.encode([parse_preference(row)])
    if isinstance(encoded, RowError):  # Llama 3.1's template writes no text beside a call
        assert (name, case) == ("llama3_1", "text and call")
        assert "leaves out part of the chosen answer" in encoded.detail
        return
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    for side, ids in (("chosen", encoded.chosen_ids), ("rejected", encoded.rejected_ids)):
        answer = row[side]
        answer = answer[0] if isinstance(answer, list) else answer
        answer = said(answer) if isinstance(answer, str) else answer
        whole = tokenizer.apply_chat_template(
            [*prompt, answer],
            chat_template=template,
            tokenize=False,
            tools=row.get("tools"),
            **row.get("chat_template_kwargs", {}),
        )
        ours = (tokenizer.decode(encoded.prompt_ids) + tokenizer.decode(ids)).removesuffix(tokenizer.eos_token)
        assert whole.removesuffix(tokenizer.eos_token).startswith(ours)
        assert whole[len(ours) :].replace(tokenizer.eos_token, "").strip() == ""


@pytest.mark.parametrize(
    ("name", "case", "lost"),
    [
        ("qwen3", "call", ()),
        ("qwen3", "thought", ()),
        ("qwen3", "variable", ()),
        ("qwen2_5", "thought", ("`reasoning_content`",)),
        ("qwen2_5", "variable", ("`chat_template_kwargs.enable_thinking`",)),
        ("llama3", "result", ("`tool_calls`", "`tools`")),
        ("phi3", "result", ("`tool_calls`", "`tools`", "text of `tool` messages")),
    ],
)
def test_what_the_template_does_not_render_is_named(
    templates: dict[str, str], name: str, case: str, lost: tuple[Any, ...]
) -> None:
    _, pairs = encoder(templates[name])
    (encoded,) = pairs.encode([parse_preference(ROWS[case])])
    assert isinstance(encoded, EncodedRow)
    assert encoded.lost == lost


def test_answers_of_which_nothing_is_rendered(templates: dict[str, str]) -> None:
    _, pairs = encoder(templates["llama3"])
    call, both = pairs.encode([parse_preference(ROWS["call"]), parse_preference(ROWS["text and call"])])
    assert call.reason == "empty response"
    assert "renders nothing of the chosen answer, which has `tool_calls`" in call.detail
    assert both.reason == "chosen equals rejected"
    assert "not rendered: `tool_calls`" in both.detail


def test_thoughts_of_some_messages_and_of_texts(templates: dict[str, str]) -> None:
    _, pairs = encoder(templates["qwen3"])
    earlier = [USER, said("Yes", reasoning_content="An earlier thought."), {"role": "user", "content": "Sure?"}]
    row = {
        "prompt": earlier,
        "chosen": said("Yes", reasoning_content="New."),
        "rejected": said("No", reasoning_content="Ah."),
    }
    assert pairs.encode([parse_preference(row)])[0].lost == ("`reasoning_content` of some messages",)
    earlier[1] = said("<think>\nEarlier.\n</think>\n\nYes")
    assert pairs.encode([parse_preference(row)])[0].lost == ("thoughts of earlier answers",)


def test_start_counts_what_is_lost_and_may_refuse_it(
    data_config: Callable[..., DataConfig], write_jsonl: Callable[..., str], tiny: PreTrainedTokenizerBase
) -> None:
    rows = [
        {"prompt": "sort b a", "chosen": "a b", "rejected": "b a", "score": 3, "images": ["x.png"]},
        {"prompt": "sort c a", "chosen": said("a c", tool_calls=CALLS), "rejected": said("c a"), "score": 1},
        {"prompt": "sort d a", "chosen": "a d", "rejected": "d a", "tools": json.dumps([TOOL])},
    ]
    path = write_jsonl(rows)
    config = data_config(path)
    summary = load_preference_dataset(config, config.train, tiny).summary
    assert summary.lost == {"`tool_calls`": 1, "`tools`": 1, "the column `images`": 1}
    assert "warning: 1 pairs lose `tool_calls`" in str(summary)
    assert "columns that nothing uses: images, score" in str(summary)
    strict = data_config(path, on_unused_fields="error")
    with pytest.raises(DataError, match=r"line 1: the column `images`: not in what is trained"):
        load_preference_dataset(strict, strict.train, tiny)
    strict = data_config(
        write_jsonl([*rows, {"prompt": "sort f a", "chosen": "a f", "rejected": "f a"}]),
        on_unused_fields="error",
        on_bad_row="skip",
    )
    summary = load_preference_dataset(strict, strict.train, tiny).summary
    assert (summary.pairs, summary.dropped) == (1, {"field not used": 3})


def test_pairs_that_differ_in_a_field_only_are_not_equal(templates: dict[str, str]) -> None:
    row = {
        "prompt": [USER],
        "chosen": said("Yes", reasoning_content="Sure."),
        "rejected": said("Yes", reasoning_content="Hm."),
    }
    _, pairs = encoder(templates["qwen3"])
    (encoded,) = pairs.encode([parse_preference(row)])
    assert encoded.chosen_ids != encoded.rejected_ids
    with pytest.raises(RowError, match="equal"):
        parse_preference({**row, "rejected": row["chosen"]})


def test_system_and_history_columns_become_messages() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "system": "Be kind.", "history": [["Q1", "A1"], ["Q2", "A2"]]}
    parsed = parse_preference(row)
    assert [message["role"] for message in parsed.prompt] == ["system", *["user", "assistant"] * 2, "user"]
    assert [message["content"] for message in parsed.prompt] == ["Be kind.", "Q1", "A1", "Q2", "A2", "Q"]
    with pytest.raises(RowError, match="differs from the system message"):
        parse_preference({**row, "prompt": [{"role": "system", "content": "Be rude."}, USER]})
    with pytest.raises(RowError, match="not a question and its answer"):
        parse_preference({**row, "history": ["Q1"]})


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_in_a_table_are_read_as_messages(write: Callable[..., Any]) -> None:
    row: dict[str, Any] = {"chosen": [USER, said("Yes")], "rejected": [USER, said("No")]}
    assert parse_preference({name: write(value) for name, value in row.items()}) == parse_preference(row)
    row = {"prompt": [USER], "chosen": said("Yes"), "rejected": said("No"), "tools": [TOOL]}
    as_text = {name: write(value) for name, value in row.items()} | {"tools": json.dumps([TOOL])}
    assert parse_preference(as_text) == parse_preference(row)


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"chosen": "[{'role': 'user'} {'role': 'assistant'}]"}, "broken messages", "neither JSON nor a Python list"),
        ({"chosen": '[{"role": "user", "content": "Q"'}, "broken messages", "schema to strings"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "not text", "a part 'image'"),
        ({"chosen": said(None)}, "not text", "null"),
        ({"tools": "get_weather"}, "broken JSON", "'tools' is not JSON"),
        ({"tools": [3]}, "not tools", "not a list of objects"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "not template variables", "cannot set 'chat_template'"),
        ({"chat_template_kwargs": [1]}, "not template variables", "not an object"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "b"}, "not a transcript", "'rejected'"),
        ({"prompt": "Else?", "chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
         "prompts differ", "occurs in no message"),
    ],
)  # fmt: skip
def test_structure_that_cannot_be_read_is_refused(row: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(RowError, match=words) as error:
        parse_preference({"prompt": "Q", "chosen": "a", "rejected": "b", **row})
    assert error.value.reason == reason


def test_transcripts_in_any_form_are_turns() -> None:
    expected = parse_preference(
        {"prompt": [USER, said("Yes"), {"role": "user", "content": "Sure?"}], "chosen": "a", "rejected": "b"}
    )
    turns = "\n\nHuman: Rome?\n\nAssistant: Yes\n\nHuman: Sure?\n\nAssistant:"
    assert parse_preference({"prompt": turns, "chosen": " a", "rejected": " b"}) == expected
    sides = {"chosen": turns + " a", "rejected": turns + " b"}
    assert parse_preference({"prompt": turns, **sides}) == parse_preference(sides) == expected
    assert parse_preference({"prompt": turns, "chosen": "a", "rejected": "b"}, "strings").prompt[0]["content"] == turns


def test_content_in_parts_is_its_texts() -> None:
    parts = [{"type": "text", "text": "Ro"}, {"type": "text", "text": "me?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}
    assert parse_preference(row).prompt == [USER]


def test_fields_that_a_column_gives_to_all_messages_are_not_there() -> None:
    """Arrow gives every object of a column the fields of all: `tool_calls: null`, arguments of other tools."""
    call = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    other = [{"function": {"name": "g", "arguments": {"b": 2}}}]
    rows = [{"chosen": [USER, said("x", tool_calls=call)]}, {"chosen": [USER, said("y", tool_calls=other)]}]
    first, second = (raw.value for raw in raw_rows(pa.Table.from_pylist(rows), [0, 1]))
    assert (first, second) == tuple(rows)


def test_answers_with_fields_under_a_template_that_ends_every_message() -> None:
    tokenizer, pairs = encoder(CHATML)
    (encoded,) = pairs.encode([parse_preference({"prompt": "Q", "chosen": said("Yes", name="Ann"), "rejected": "No"})])
    assert tokenizer.decode(encoded.chosen_ids) == "Yes<|im_end|>"
    assert encoded.lost == ("`name`",)
