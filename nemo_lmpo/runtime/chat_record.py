"""How a run makes token ids of conversations, kept beside its weights so that every later use does the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.runtime.files import read_small

_MOST_BYTES = 2**22


@dataclass(frozen=True)
class ChatRecord:
    """What decides the token ids of a conversation, beside the tokenizer."""

    template: str
    """Jinja text of the chat template."""
    system_prompt: str | None
    """A system message for conversations that have none."""
    adds_bos: bool
    """Whether a BOS stands in front that the template does not write."""
    end_of_turn: str
    """The token that ends a response."""
    end_of_turn_id: int


def chat_json(record: ChatRecord) -> str:
    """The content of a `chat.json`, with the hash of its template."""
    return json.dumps({**asdict(record), "template_sha256": _hash(record.template)}, indent=1)


def read_chat_record(path: Path) -> ChatRecord:
    """Of a `chat.json`.

    Raises:
        CheckpointError: the file is not what this project writes.
    """
    try:
        values = json.loads(read_small(path, _MOST_BYTES))
        stored = values.pop("template_sha256")
        record = ChatRecord(**values)
        usable = all(
            (
                isinstance(record.template, str),
                isinstance(record.system_prompt, str | None),
                isinstance(record.adds_bos, bool),
                isinstance(record.end_of_turn, str),
                type(record.end_of_turn_id) is int and record.end_of_turn_id >= 0,
            )
        )
        intact = usable and stored == _hash(record.template)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable ({type(error).__name__}); restore the file") from None
    if not intact:
        raise CheckpointError(f"{path} does not hold the chat template that its hash names; restore the file")
    return record


def _hash(template: str) -> str:
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
