"""A base model without a chat: fine-tuned on conversations with marks that become tokens, it answers and stops.

The model is small and random, with the token settings of a base model: EOS ends texts, and no mark is a token.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_lmpo.convert.command import hf_to_nemo, nemo_to_hf, verify
from nemo_lmpo.export.write import export_run
from nemo_lmpo.formats.grown_source import GrownSource
from nemo_lmpo.formats.model_files import open_model
from tests.distributed.training_runs import train
from tests.distributed.workers import run_workers

MARKS = ("<|im_start|>", "<|im_end|>")
QUESTION = [{"role": "user", "content": "hello"}]
ANSWER = "yes"


def write_base(directory: Path) -> None:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words.save_pretrained(directory)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder / "base")
    turns = [*QUESTION, {"role": "assistant", "content": ANSWER}]
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": turns * n}) + "\n" for n in (1, 2) * 8))
    overrides = (
        *("loss=sft", f"model.restore_from_path={folder / 'base'}", "model.architecture=null", "model.tokenizer=null"),
        *(f"data.train.path={folder / 'train.jsonl'}", "data.validation.path=null", "data.chat_template=chatml"),
        *(f"data.cache_dir={folder / 'cache'}", "data.max_length=120", "data.max_prompt_length=60"),
        *("data.row_tokens=null", "model.global_batch_size=8", "trainer.max_epochs=30", "trainer.max_steps=null"),
        *("optim.lr=5e-3", f"data.add_special_tokens=[{','.join(repr(mark) for mark in MARKS)}]"),
    )
    run_workers(1, train, str(folder / "run"), overrides, str(folder / "policy.nemo"), timeout=200)
    export_run(folder / "run", folder / "hf")
    return folder


def test_transformers_stops_behind_the_answer(exported: Path) -> None:
    words, model = AutoTokenizer.from_pretrained(exported / "hf"), AutoModelForCausalLM.from_pretrained(exported / "hf")
    assert [len(words(mark, add_special_tokens=False)["input_ids"]) for mark in MARKS] == [1, 1]
    assert model.config.vocab_size == len(words) == 261
    prompt = words.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert words.decode(answer) == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize("form", ["the run", "its archive", "the export as .nemo"])
def test_the_grown_model_goes_through_nemo_and_back(form: str, exported: Path, tmp_path: Path) -> None:
    """Rows and tokens that were added are there in every form, and so are template and end of turn."""
    source = {"the run": exported / "run", "its archive": exported / "policy.nemo"}.get(form, tmp_path / "m.nemo")
    if form == "the export as .nemo":
        assert hf_to_nemo(["--input", str(exported / "hf"), "--output", str(source), "--verify", "--quiet"]) == 0
    assert nemo_to_hf(["--input", str(source), "--output", str(tmp_path / "hf"), "--quiet"]) == 0
    assert verify(["--hf", str(tmp_path / "hf"), "--nemo", str(source), "--quiet"]) == 0
    expected, found = (load_file(folder / "hf" / "model.safetensors") for folder in (exported, tmp_path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["model.embed_tokens.weight"].shape[0] == found["lm_head.weight"].shape[0] == 261
    words, model = AutoTokenizer.from_pretrained(tmp_path / "hf"), AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert words.convert_tokens_to_ids(list(MARKS)) == [259, 260]
    prompt = words.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert words.decode(answer) == f"{ANSWER}<|im_end|>"


def test_llama_cpp_stops_behind_the_answer(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    from tests.system.llama_cpp_server import served, write_gguf
    from tests.system.test_llama_cpp import ask

    write_gguf(exported / "hf", tmp_path / "model.gguf")
    with served(tmp_path / "model.gguf") as address:
        asked = {"messages": QUESTION, "max_tokens": 20, "temperature": 0.0}
        (choice,) = ask(address, "/v1/chat/completions", asked)["choices"]
    assert choice["message"]["content"] == ANSWER
    assert choice["finish_reason"] == "stop"


def test_new_rows_are_the_mean_of_the_old(exported: Path) -> None:
    base = load_file(exported / "base" / "model.safetensors")
    grown = GrownSource(open_model(exported / "base").source, 262, (259, 260))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found = grown.get(name)
        assert found.shape == grown.shape(name) == (262, 64)
        assert torch.equal(found[:259], base[name])
        assert torch.allclose(found[259:261], base[name].mean(dim=0).expand(2, -1), atol=1e-7)
        assert not found[261].any()
    assert torch.equal(grown.get("model.norm.weight"), base["model.norm.weight"])
    spare = GrownSource(open_model(exported / "base").source, 259, (258,)).get("lm_head.weight")
    assert torch.allclose(spare[258], base["lm_head.weight"][:258].mean(dim=0), atol=1e-7)
