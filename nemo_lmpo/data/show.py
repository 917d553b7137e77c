"""Examples as text, for people to look at."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from nemo_lmpo.data.example import Example
from nemo_lmpo.errors import printable, printable_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def example_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """An example as the model sees it, decoded, with what is predicted between markers."""
    return _conversation(example, tokenizer) if len(example.responses) == 1 else _pair(example, tokenizer)


def _pair(pair: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    chosen, rejected = (response.ids for response in pair.responses)
    parts = {"prompt": pair.prompt_ids, "chosen": chosen, "rejected": rejected}
    lines = [f"pair {printable(pair.example_id, 80)} (responses stand between >>> and <<<)"]
    for name, ids in parts.items():
        said = _decoded(tokenizer, ids)
        shown = said if name == "prompt" else f">>>{said}<<<"
        lines.append(f"{name}, {len(ids)} tokens:\n{printable_lines(shown, indent='  ')}")
    return "\n".join(lines)


def _conversation(conversation: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    (response,) = conversation.responses
    decoded = partial(_decoded, tokenizer)
    said, behind = decoded(conversation.prompt_ids), 0
    for start, stop in response.spans or ((0, len(response.ids)),):
        said += f"{decoded(response.ids[behind:start])}>>>{decoded(response.ids[start:stop])}<<<"
        behind = stop
    total = len(conversation.prompt_ids) + len(response.ids)
    return (
        f"conversation {printable(conversation.example_id, 80)} (what is predicted stands between >>> and <<<)\n"
        f"{total} tokens, {response.predicted} of them predicted:\n{printable_lines(said, indent='  ')}"
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
