"""Rows in the layouts of public sets down to their token ids, against transformers' rendering of the same messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nemo_lmpo.data.preference import load_preference_dataset
from nemo_lmpo.data.rows.ranked import LEFT_OUT, TIED

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with marks, for transformers alone."""
Messages = list[dict[str, Any]]


def talk(*texts: str, system: str | None = None) -> Messages:
    front = [] if system is None else [{"role": "system", "content": system}]
    return [*front, *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts))]


def turns(*texts: str) -> Messages:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def parts(messages: Messages) -> Messages:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


TWO = ("Name 2 colours.", "Red,\nblue.", "One more?", " Grün!")
CONVERSATIONS: dict[str, tuple[dict[str, Any], Messages, int]] = {
    "UltraChat": ({"prompt": TWO[0], "prompt_id": "u1", "messages": talk(*TWO)}, talk(*TWO), 0),
    "Tulu 3": ({"id": "t1", "source": "ai2/x", "messages": talk(*TWO)}, talk(*TWO), 0),
    "OpenHermes": (
        {
            "conversations": [{"from": "system", "value": "Be brief.", "weight": None}, *turns("Why?", "So.")],
            **{"source": "x", "category": None, "skip_prompt_formatting": None, "system_prompt": None},
        },
        talk("Why?", "So.", system="Be brief."),
        0,
    ),
    "ShareGPT": ({"id": "s1_0", "conversations": turns(*TWO)}, talk(*TWO), 0),
    "ShareGPT as JSON text": ({"conversations": json.dumps(turns(*TWO))}, talk(*TWO), 0),
    "Magpie": (
        {"uuid": "m", "instruction": "Why?", "response": "So.", "conversations": turns("Why?", "So.")},
        talk("Why?", "So."),
        0,
    ),
    "Capybara": (
        {"source": "x", "conversation": [{"input": TWO[0], "output": TWO[1]}, {"input": TWO[2], "output": TWO[3]}]},
        talk(*TWO),
        0,
    ),
    "Alpaca": ({"instruction": "Sort:", "input": "b a", "output": "a b"}, talk("Sort:\nb a", "a b"), 1),
    "Alpaca without input": ({"instruction": "Hi", "input": "", "output": "Ho"}, talk("Hi", "Ho"), 1),
    "LLaMA-Factory's Alpaca": (
        {"instruction": TWO[2], "input": "", "output": TWO[3], "system": "S.", "history": [list(TWO[:2])]},
        talk(*TWO, system="S."),
        4,
    ),
    "TRL's completion": ({"prompt": "Hi", "completion": "Ho"}, talk("Hi", "Ho"), 1),
    "TRL's conversational completion": ({"prompt": talk("Hi"), "completion": talk("", "Ho")[1:]}, talk("Hi", "Ho"), 1),
    "content in parts": ({"messages": parts(talk(*TWO))}, talk(*TWO), 0),
}
UNION = {name for row, _, _ in CONVERSATIONS.values() for name in row}
PAIR = (talk("Näher?"), "Ja, 12.", "Nein")
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Näher?", "chosen": "Ja, 12.", "rejected": "Nein"},
    "UltraFeedback-binarized": {
        "prompt": "Näher?",
        **{side: talk("Näher?", text) for side, text in (("chosen", PAIR[1]), ("rejected", PAIR[2]))},
        **{"score_chosen": 8.0, "score_rejected": 2.0},
    },
    "HH": {
        f"{side}": f"\n\nHuman: Näher?\n\nAssistant: {said}"
        for side, said in zip(("chosen", "rejected"), PAIR[1:], strict=False)
    },
    "ShareGPT's pairs": {
        "conversations": turns("Näher?"),
        "chosen": {"from": "gpt", "value": PAIR[1]},
        "rejected": {"from": "gpt", "value": PAIR[2]},
    },
    "ranked": {"prompt": "Näher?", "responses": ["Hm", PAIR[2], PAIR[1]], "scores": [3, 1, 5]},
    "Nectar": {
        "prompt": "\n\nHuman: Näher?\n\nAssistant: ",
        "answers": [{"answer": f" {PAIR[2]}", "rank": 7.0}, {"answer": f" {PAIR[1]}", "rank": 1.0}],
    },
    "parts": {side: parts(talk("Näher?", said)) for side, said in zip(("chosen", "rejected"), PAIR[1:], strict=True)},
    "messages as JSON text": {
        side: json.dumps(talk("Näher?", said)) for side, said in zip(("chosen", "rejected"), PAIR[1:], strict=True)
    },
}


def expected(tokenizer: Any, messages: Messages, prompt: int) -> tuple[list[int], list[bool]]:
    """Ids and mask of transformers; of answers that belong to a prompt nothing is predicted."""
    options: dict[str, Any] = {"chat_template": MARKED, "tokenize": True, "return_dict": True}
    found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    flags = [bool(flag) for flag in found["assistant_masks"]]
    if prompt:
        asked = tokenizer.apply_chat_template(messages[:prompt], add_generation_prompt=True, **options)["input_ids"]
        flags[: len(asked)] = [False] * len(asked)
    last = max(place for place, flag in enumerate(flags) if flag)
    return found["input_ids"][: last + 1], flags[: last + 1]


def laid(example: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask of an example with one response."""
    (response,) = example.responses
    flags = [response.spans is None] * len(response.ids)
    for start, stop in response.spans or ():
        flags[start:stop] = [True] * (stop - start)
    return [*example.prompt_ids, *response.ids], [False] * len(example.prompt_ids) + flags


def load(rows: list[dict[str, Any]], tokenizer: Any, tools: tuple[Callable[..., Any], ...], **more: Any) -> Any:
    write_jsonl, data_config = tools
    config = data_config(write_jsonl(rows), chat_template="chatml", max_length=400, max_prompt_length=200)
    return load_preference_dataset(config, config.train, tokenizer, **more)


@pytest.fixture
def tools(write_jsonl: Callable[..., Any], data_config: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    return write_jsonl, data_config


@pytest.mark.parametrize("nulls", [False, True], ids=["own columns", "all columns of all layouts"])
def test_conversations_of_all_layouts_in_one_file(nulls: bool, smollm2: Any, tools: Any) -> None:
    """As they are, and as a table keeps them, whose columns are null where a row has none."""
    rows = [{**dict.fromkeys(UNION if nulls else ()), **row} for row, _, _ in CONVERSATIONS.values()]
    data = load(rows, smollm2, tools, takes=("pairs", "conversations"))
    assert len(data) == len(rows)
    for place, (name, (_, messages, prompt)) in enumerate(CONVERSATIONS.items()):
        assert laid(data[place]) == expected(smollm2, messages, prompt), name


def test_pairs_of_all_layouts_in_one_file(smollm2: Any, tools: Any) -> None:
    """For a loss on pairs both answers, for SFT beside a conversation the chosen one."""
    data = load(list(PAIRS.values()), smollm2, tools)
    prompt, *answers = PAIR
    wanted = [expected(smollm2, [*prompt, {"role": "assistant", "content": said}], 1) for said in answers]
    asked = wanted[0][1].index(True)
    for place, name in enumerate(PAIRS):
        assert data[place].prompt_ids == wanted[0][0][:asked], name
        assert [response.ids for response in data[place].responses] == [ids[asked:] for ids, _ in wanted], name
    mixed = load([*PAIRS.values(), {"messages": talk(*TWO)}], smollm2, tools, takes=("pairs", "conversations"))
    for place, name in enumerate(PAIRS):
        assert laid(mixed[place]) == wanted[0], name
    assert laid(mixed[len(PAIRS)]) == expected(smollm2, talk(*TWO), 0)


def test_what_the_start_says_of_ties_and_of_answers_without_a_score(smollm2: Any, tools: Any) -> None:
    """Each note with its number of pairs; of a tie the first answer is taken."""
    scores = ([5, 1, 5], [5, 1, 1], [5, None, 1], [5, "", 5, 1], [5, 3, 1], [5, float("nan"), 2])
    answers = ("eins", "zwei", "drei", "vier")
    rows = [{"prompt": "Q", "responses": answers[: len(each)], "scores": each} for each in scores]
    data = load(rows, smollm2, tools)
    assert data.summary.notes[TIED] == 3
    assert data.summary.notes[LEFT_OUT] == 3
    assert f"  3 pairs: {TIED}" in str(data.summary)
    assert f"  3 pairs: {LEFT_OUT}" in str(data.summary)
    best_and_worst = [("eins", "zwei"), ("eins", "zwei"), ("eins", "drei"), ("eins", "vier"), ("eins", "drei")]
    for example, sides in zip(
        (data[place] for place in range(len(data))), [*best_and_worst, ("eins", "drei")], strict=False
    ):
        told = [smollm2.decode(response.ids).removesuffix("<|im_end|>") for response in example.responses]
        assert told == list(sides)
