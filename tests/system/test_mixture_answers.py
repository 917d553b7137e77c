"""Answers of a tiny mixture are the same from its run and from its export."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_lmpo.export.write import export_run
from nemo_lmpo.generate.__main__ import main
from tests.distributed.mixture_runs import run

TOKENS = 12


def answers_of(model: Path, prompts: Path, output: Path) -> list[str]:
    """What `generate` writes, greedily."""
    given = ["--model", str(model), "--prompts", str(prompts), "--max-new-tokens", str(TOKENS)]
    assert main([*given, "--device", "cpu", "--quiet", "--output", str(output)]) == 0
    return [json.loads(line)["response"] for line in output.read_text().splitlines()]


def test_a_run_and_its_export_answer_alike(tmp_path: Path) -> None:
    """And as transformers' own generation from the export does, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_lmpo.answers.engine import open_prompting
    from nemo_lmpo.answers.prompts import encode_prompts, read_prompts

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"sort {' '.join(text)}"}) for text in ("ca", "edb", "hgfa")))
    trained = run(1, tmp_path / "run", ("trainer.max_steps=1", "data.train.limit=30"))
    exported = export_run(trained, tmp_path / "hf")
    found = answers_of(trained, prompts, tmp_path / "of_run.jsonl")
    assert found == answers_of(exported, prompts, tmp_path / "of_export.jsonl")
    assert len(set(found)) > 1
    prompting = open_prompting(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for ids, answer in zip(encode_prompts(read_prompts(prompts, None), prompting.encoder), found, strict=True):
        given = torch.tensor([ids])
        whole = model.generate(given, max_new_tokens=TOKENS, do_sample=False, eos_token_id=prompting.stop_ids)
        assert tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True).strip() == answer.strip()
