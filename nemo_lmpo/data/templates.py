"""Chat templates by name, for tokenizers that have none or another one than the data should get."""

from __future__ import annotations

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# As Qwen3 writes an answer without thinking: an empty thought opens the last answer, and belongs to the prompt.
CHATML_NO_THINKING = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# A system text has no place of its own: it goes in front of the first user text.
MISTRAL = (
    "{{ bos_token }}"
    "{% set pending = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if not loop.first %}{{ raise_exception('a system message must come first') }}{% endif %}"
    "{% set pending.system = (message['content'] | trim) + '\n\n' %}"
    "{% elif message['role'] == 'user' %}"
    "[INST] {{ (pending.system + (message['content'] | trim)) | trim }} [/INST]"
    "{% set pending.system = '' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' }}{{ message['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
)

# As the released trainers of SimPO and LMPO write it: a blank in front of EOS, BOS left to the tokenizing.
MISTRAL_RELEASED = (
    MISTRAL.replace("{{ bos_token }}", "")
    .replace("{{ eos_token }}", "{{ ' ' }}{{ eos_token }}")
    .replace("(message['content'] | trim)) | trim", "message['content']) | trim")
)

ZEPHYR = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Texts as they are: nothing between the prompt and its response, an empty line between earlier turns.
PLAIN = (
    "{% for message in messages %}"
    "{% if not loop.first and not (loop.last and message['role'] == 'assistant') %}{{ '\n\n' }}{% endif %}"
    "{{ message['content'] }}"
    "{% endfor %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "chatml_no_thinking": CHATML_NO_THINKING,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "plain": PLAIN,
    "zephyr": ZEPHYR,
}

RELEASED_TEMPLATES = {"mistral": MISTRAL_RELEASED}
"""What the names mean with `data.compat=released_code`, where the released trainers' form is another one."""
