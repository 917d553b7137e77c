"""An export in llama.cpp itself: it writes the prompts of training, and stops where the answers of training end."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.system.llama_cpp_server import served, write_gguf
from tests.unit.export import test_chat_of_training as chat
from tests.unit.export.test_chat_of_training import starts, state  # noqa: F401 - fixtures

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")


def ask(address: str, path: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.parametrize(("template", "start"), [("chatml", "none"), ("chatml", "inline"), ("file", "both")])
def test_llama_cpp_renders_and_stops_as_in_training(
    template: str,
    start: str,
    starts: dict[str, Path],  # noqa: F811
    state: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    end = chat.ENDS.get(template, "<|turn_end|>")
    choice = template
    if template == "file":
        choice = str(tmp_path / "own.jinja")
        Path(choice).write_text(chat.FILE)
    chat.trained(tmp_path / "run", state, starts[start], choice, chat.SYSTEM)
    chat.by_conversion(tmp_path / "run", tmp_path / "hf")
    write_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    expected = words.apply_chat_template(chat.QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    with served(tmp_path / "model.gguf") as address:
        prompt = ask(address, "/apply-template", {"messages": chat.QUESTION})["prompt"]
        ids = ask(address, "/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        assert ids == expected, (prompt, words.decode(expected))
        for token, reason in ((end, "stop"), ("x", "length")):
            bias = [[words.convert_tokens_to_ids(token), 1000.0]]
            answer = ask(
                address, "/v1/chat/completions", {"messages": chat.QUESTION, "max_tokens": 4, "logit_bias": bias}
            )
            assert answer["choices"][0]["finish_reason"] == reason, answer
