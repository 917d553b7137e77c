"""A server that completes token ids by transformers' own sampling: `model_server.py DIRECTORY --host H --port P`.

Every request is noted as a line of `MODEL_SERVER_REQUESTS`, a file.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_lmpo.evaluate.local_server import JsonHandler, serve

_ONE_AT_A_TIME = threading.Lock()


def completed(model: Any, tokenizer: Any, asked: dict[str, Any]) -> dict[str, Any]:
    ids = torch.tensor([asked["prompt"]])
    with _ONE_AT_A_TIME, torch.no_grad():
        torch.manual_seed(asked.get("seed", 0))
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=asked.get("temperature", 1.0),
            top_p=asked.get("top_p", 1.0),
            top_k=max(asked.get("top_k", 0), 0),
            max_new_tokens=asked["max_tokens"],
            eos_token_id=asked.get("stop_token_ids") or None,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
    ended = found[-1] in asked.get("stop_token_ids", [])
    text = tokenizer.decode(found, skip_special_tokens=True)
    usage = {"prompt_tokens": ids.shape[1], "completion_tokens": len(found)}
    return {"choices": [{"text": text, "finish_reason": "stop" if ended else "length"}], "usage": usage}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.directory)

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.send_json(200, {"data": [{"id": options.directory}]})

        def do_POST(self) -> None:
            asked = json.loads(self.body())
            with _ONE_AT_A_TIME, Path(os.environ["MODEL_SERVER_REQUESTS"]).open("a") as file:
                file.write(json.dumps([asked["prompt"], asked.get("seed"), asked["max_tokens"]]) + "\n")
            self.send_json(200, completed(model, tokenizer, asked))

    with serve(Handler, options.port):
        threading.Event().wait()


if __name__ == "__main__":
    main()
