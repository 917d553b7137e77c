"""Tokens that end an answer."""

from __future__ import annotations

from nemo_lmpo.data.chat import ChatFormat
from nemo_lmpo.formats.architecture import parse_json
from nemo_lmpo.formats.fields import Fields


def stop_ids(chat: ChatFormat, generation_config: bytes | None, origin: str) -> list[int]:
    """Tokens that end an answer: EOS, the template's end of turn, and what a model's own generation config names.

    Args:
        chat: template and tokenizer.
        generation_config: the model's `generation_config.json` if it has one.
        origin: names the model in errors.

    Raises:
        CheckpointError: the generation config is damaged.
    """
    found = {chat.tokenizer.eos_token_id, chat.end_of_turn_id()}
    place = f"{origin}: generation_config.json"
    named = Fields(parse_json(generation_config or b"{}", place), place).values.get("eos_token_id")
    found.update(named if isinstance(named, list) else [named])
    return sorted(token for token in found if isinstance(token, int))
