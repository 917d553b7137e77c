"""The side files of a trained model, with the chat template, system prompt and end of turn that it was trained with.

Who serves or loads a model looks in different places: `transformers` and vLLM prefer `chat_template.jinja`, llama.cpp
`tokenizer_config.json`; `transformers` stops at the tokens of `generation_config.json`, vLLM at these and the
tokenizer's EOS, llama.cpp at the tokenizer's EOS. All of them are made to say the same here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from nemo_lmpo.formats.architecture import parse_json
from nemo_lmpo.formats.fields import Fields
from nemo_lmpo.formats.sidecars import special_token_ids
from nemo_lmpo.formats.template_limits import TemplateFailed, within_limits
from nemo_lmpo.runtime.chat_record import ChatRecord

_logger = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG, _GENERATION, _CONFIG = "tokenizer_config.json", "generation_config.json", "config.json"
_PROCESSOR_TEMPLATE, _ADDITIONAL = "chat_template.json", "additional_chat_templates/"


def served_template(record: ChatRecord) -> str:
    """The template that gives everybody the text of training: it writes the BOS and the system prompt itself.

    Messages that begin with a system message keep theirs.
    """
    # Each addition ends with a line break, which readers of chat templates take away behind a block (trim_blocks).
    text = record.template
    if record.adds_bos:
        text = "{% if true %}{{ bos_token }}{% endif %}\n" + text
    if record.system_prompt is not None and renders_with_default(record):
        text = _default_system(record.system_prompt) + text
    return text


def _default_system(prompt: str) -> str:
    return (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        f"{{% set messages = [{{'role': 'system', 'content': {json.dumps(prompt, ensure_ascii=False)}}}] + messages %}}"
        "{% endif %}\n"
    )


def renders_with_default(record: ChatRecord) -> bool:
    """Whether the template with a default system text renders as the plain one with a system message."""
    if record.system_prompt is None:
        return True
    question, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
    system = {"role": "system", "content": record.system_prompt}
    text = _default_system(record.system_prompt) + record.template
    conversations = ([question], [question, answer], [question, answer, question])
    wanted = [_render(record.template, [system, *messages]) for messages in conversations]
    # Some templates take one question only.
    return any(wanted) and wanted == [_render(text, messages) for messages in conversations]


def _render(template: str, messages: list[dict[str, str]]) -> str | None:
    """As `transformers` renders, with special tokens that no tokenizer has; None if the template refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    asks = messages[-1]["role"] == "user"
    try:
        rendered, _ = within_limits(
            lambda: render_jinja_template([messages], chat_template=template, add_generation_prompt=asks, **tokens)
        )
    except TemplateFailed:
        return None
    return str(rendered[0])


def with_chat(files: Mapping[str, bytes], record: ChatRecord, origin: str) -> dict[str, bytes]:
    """The files with template and end of turn as trained; those that say so already are not touched.

    Args:
        files: side files of a Hugging Face model by name; `config.json` among them.
        record: how the model was trained.
        origin: names the model in errors.

    Raises:
        CheckpointError: one of the files is damaged.
    """
    files = dict(files)
    template = served_template(record)
    settings = _read(files, _TOKENIZER_CONFIG, origin)
    _put_template(files, settings, template, origin)
    _put_end_of_turn(files, settings, record, template, origin)
    if settings != _read(files, _TOKENIZER_CONFIG, origin):
        files[_TOKENIZER_CONFIG] = _text(settings)
    return files


def _put_template(files: dict[str, bytes], settings: dict[str, Any], template: str, origin: str) -> None:
    before = files[TEMPLATE_FILE].decode("utf-8", "replace") if TEMPLATE_FILE in files else None
    listed = _default_of(settings.get("chat_template"))
    if (listed if before is None else before) != template:
        # Those for tools and the like are of another format than the model was trained with.
        for name in [name for name in files if name.startswith(_ADDITIONAL)]:
            _logger.info("%s: %s is left out: the model was trained with another chat template", origin, name)
            del files[name]
    if before != template and (before is not None or listed != template):
        files[TEMPLATE_FILE] = template.encode()
    if "chat_template" in settings and listed != template:
        settings["chat_template"] = template
    processor = _read(files, _PROCESSOR_TEMPLATE, origin)
    if "chat_template" in processor and _default_of(processor["chat_template"]) != template:
        files[_PROCESSOR_TEMPLATE] = _text({**processor, "chat_template": template})


def _default_of(value: Any) -> str | None:
    """The template itself, or the one called `default` of a list of them."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _put_end_of_turn(
    files: dict[str, bytes], settings: dict[str, Any], record: ChatRecord, template: str, origin: str
) -> None:
    config, generation = _read(files, _CONFIG, origin), _read(files, _GENERATION, origin)
    usual, end = special_token_ids(files, origin), record.end_of_turn_id
    named = (values.get("eos_token_id") for values in (generation, config, usual))
    known = next(filter(None, map(_ids, named)), [])
    if end not in known:
        others = {name: config.get(name, usual.get(name)) for name in ("bos_token_id", "pad_token_id")}
        made = {name: number for name, number in others.items() if number is not None}
        ends = [*known, end]
        files[_GENERATION] = _text({**(generation or made), "eos_token_id": ends if len(ends) > 1 else end})
    if _may_be_eos(files, settings, record, template, origin):
        settings["eos_token"] = record.end_of_turn
        special = _read(files, "special_tokens_map.json", origin)
        if "eos_token" in special:
            files["special_tokens_map.json"] = _text({**special, "eos_token": record.end_of_turn})
        if _CONFIG in files:
            files[_CONFIG] = _text({**config, "eos_token_id": end})
    elif _CONFIG in files and config.get("eos_token_id") is not None and end not in _ids(config["eos_token_id"]):
        files[_CONFIG] = _text({**config, "eos_token_id": [*_ids(config["eos_token_id"]), end]})


def _may_be_eos(
    files: Mapping[str, bytes], settings: Mapping[str, Any], record: ChatRecord, template: str, origin: str
) -> bool:
    """Whether the end of turn can take the EOS's place in the tokenizer without changing the ids of any text."""
    own = _token(settings.get("eos_token"))
    if own is None or own == record.end_of_turn or "eos_token" in template or settings.get("add_eos_token"):
        return False
    if "tokenizer.json" not in files:
        return False
    tokenizer = _read(files, "tokenizer.json", origin)
    added = tokenizer.get("added_tokens")
    if record.end_of_turn not in {_token(token) for token in (added if isinstance(added, list) else ())}:
        return False
    # A tokenizer that ends texts with its EOS would end them with another token then.
    return own not in json.dumps(tokenizer.get("post_processor"), ensure_ascii=False)


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


def _ids(value: Any) -> list[int]:
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]


def _read(files: Mapping[str, bytes], name: str, origin: str) -> dict[str, Any]:
    place = f"{origin}: {name}"
    return dict(Fields(parse_json(files.get(name, b"{}"), place), place).values)


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
