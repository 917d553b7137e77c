"""Load models as whichever transformers is first on the path does: `read_model.py DIR...` prints what they compute."""

from __future__ import annotations

import json
import sys
from typing import Any

CHAT = [{"role": "user", "content": "sort b a"}]


def read_model(directory: str) -> dict[str, Any]:
    """Token ids of a conversation, logits at each of them, and what is generated greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    # Far enough for the rotary base to matter.
    tokens = torch.tensor([ids * 4])
    with torch.no_grad():
        logits = model(tokens).logits[0]
        generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
    return {
        "text": tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False),
        "ids": ids,
        "dtype": str(model.dtype),
        "logits": logits.tolist(),
        "generated": generated[0].tolist(),
    }


if __name__ == "__main__":
    import transformers

    found = {directory: read_model(directory) for directory in sys.argv[1:]}
    print(json.dumps({"version": transformers.__version__, "found": found}))
