"""What is written and read agrees with NeMo's own formats, independently of this project's code."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from nemo_lmpo.convert.command import hf_to_nemo, nemo_to_hf
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.architecture import RopeScaling, architecture_from_hf, architecture_to_hf, read_architecture
from nemo_lmpo.formats.distributed_writer import write_distributed_checkpoint
from nemo_lmpo.formats.huggingface import HuggingFaceSource
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.nemo import architecture_from_nemo, architecture_from_nemo2, nemo_config
from nemo_lmpo.formats.sinks import DirectorySink
from tests.unit.formats import tiny_models as tiny


def _convert_back(source: Path, output: Path, *more: str) -> dict[str, torch.Tensor]:
    assert nemo_to_hf(["--input", str(source), "--output", str(output), "--quiet", *more]) == 0
    tensors: dict[str, torch.Tensor] = load_file(output / "model.safetensors")
    return tensors


@pytest.mark.parametrize("name", ["nemo1_llama_bf16/llama_bf16.nemo", "nemo2_llama_bf16"])
def test_checkpoints_written_by_nvidia(shared_dir: Path, tmp_path: Path, name: str) -> None:
    reference = shared_dir / "nemo_ckpts" / "hf_llama_bf16"
    expected = load_file(reference / "model.safetensors")
    found = _convert_back(shared_dir / "nemo_ckpts" / name, tmp_path / "hf")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], tensor), key
    tokenizer = (reference / "tokenizer.model").read_bytes()
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer
    # NVIDIA's script sets the switch of Llama 3.1 scaling for every Llama; this one has 128 positions.
    assert read_architecture(tmp_path / "hf").rope_scaling is None
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps"):
        assert config[key] == json.loads((reference / "config.json").read_text())[key], key


@pytest.mark.parametrize(
    ("positions", "factors", "expected"),
    [
        (8192, {}, None),
        (131072, {}, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        (128, {"scale_factor": 32.0, "old_context_len": 64}, RopeScaling("llama3", 32.0, 1.0, 4.0, 64)),
    ],
)
def test_switch_of_llama31_scaling(positions: int, factors: dict[str, float], expected: RopeScaling | None) -> None:
    """NVIDIA's converter sets it for Llama 2 and 3, too, whose positions need no scaling."""
    made = nemo_config(architecture_from_hf(tiny.config("llama3").to_dict()), "bf16", {})
    made.update(max_position_embeddings=positions, scale_positional_embedding=True, **factors)
    assert architecture_from_nemo(made, 259, "model_config.yaml").rope_scaling == expected


@pytest.mark.parametrize(
    ("family", "given", "window"),
    [
        ("llama3", {"sliding_window": 8}, None),
        ("mistral_v01", {}, 4096),
        ("mistral_v01", {"sliding_window": None}, None),
        ("mistral_v01", {"sliding_window": 16}, 16),
    ],
)
def test_sliding_window_is_what_transformers_makes_of_it(
    family: str, given: dict[str, int | None], window: int | None
) -> None:
    config = tiny.config(family).to_dict()
    config.pop("sliding_window", None)
    assert architecture_from_hf({**config, **given}).sliding_window == window


@pytest.mark.parametrize("family", ["llama3", "mistral_v01", "qwen25", "qwen3"])
def test_absent_fields_are_the_familys_defaults(family: str) -> None:
    config = tiny.config(family).to_dict()
    absent = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    for name in (*absent, "initializer_range"):
        config.pop(name, None)
    sizes = {"num_attention_heads": 16, "hidden_size": 64}
    found = architecture_from_hf({**config, **sizes})
    made = type(tiny.config(family))(**{**{k: v for k, v in config.items() if k != "model_type"}, **sizes})
    assert found.num_query_groups == made.num_key_value_heads
    assert found.head_dim == (getattr(made, "head_dim", None) or 64 // 16)
    assert found.max_position_embeddings == made.max_position_embeddings
    assert found.rms_norm_eps == made.rms_norm_eps
    assert found.tie_word_embeddings == made.tie_word_embeddings
    assert found.initializer_range == made.initializer_range


def test_sample_gives_a_model_that_transformers_loads(shared_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    samples = shared_dir / "nemo_ckpts"
    _convert_back(samples / "nemo2_llama_bf16", tmp_path / "hf")
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path)(ids).logits
            for path in (samples / "hf_llama_bf16", tmp_path / "hf")
        ]
    assert torch.equal(*logits)
    text = "a text with several words"
    tokens = [
        AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (samples / "hf_llama_bf16", tmp_path / "hf")
    ]
    assert tokens[0] == tokens[1]


def _plain_torch_read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, by torch's own reader."""
    entries: dict[str, Any] = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=FileSystemReader(directory), no_dist=True)
    return tensors


def test_written_tensors_follow_the_documented_layout(tmp_path: Path) -> None:
    """Keys and shapes of NeMo's checkpoints; QKV per group as q heads, k, v; fc1 as gate over up."""
    source = tiny.save("llama3", tmp_path / "hf", torch.bfloat16)
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "nemo"), "--quiet"]) == 0
    expected = load_file(source / "model.safetensors")
    found = _plain_torch_read(tmp_path / "nemo" / "model_weights")
    layers, hidden, heads, groups, size, ffn = 4, 64, 4, 2, 16, 96
    decoder = "model.decoder.layers."
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == {
        "model.embedding.word_embeddings.weight": (259, hidden),
        decoder + "self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        decoder + "self_attention.linear_qkv.weight": (layers, (heads + 2 * groups) * size, hidden),
        decoder + "self_attention.linear_proj.weight": (layers, hidden, hidden),
        decoder + "mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        decoder + "mlp.linear_fc1.weight": (layers, 2 * ffn, hidden),
        decoder + "mlp.linear_fc2.weight": (layers, hidden, ffn),
        "model.decoder.final_layernorm.weight": (hidden,),
        "model.output_layer.weight": (259, hidden),
    }
    for layer in range(layers):
        hf = f"model.layers.{layer}."
        qkv = found[decoder + "self_attention.linear_qkv.weight"][layer].view(groups, heads // groups + 2, size, hidden)
        assert torch.equal(qkv[:, :-2].reshape(-1, hidden), expected[hf + "self_attn.q_proj.weight"])
        assert torch.equal(qkv[:, -2].reshape(-1, hidden), expected[hf + "self_attn.k_proj.weight"])
        assert torch.equal(qkv[:, -1].reshape(-1, hidden), expected[hf + "self_attn.v_proj.weight"])
        gate_up = torch.cat([expected[hf + f"mlp.{part}_proj.weight"] for part in ("gate", "up")])
        assert torch.equal(found[decoder + "mlp.linear_fc1.weight"][layer], gate_up)
        norm = expected[hf + "post_attention_layernorm.weight"]
        assert torch.equal(found[decoder + "mlp.linear_fc1.layer_norm_weight"][layer], norm)


_SAME_AS_NVIDIA = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("encoder_seq_length", "max_position_embeddings", "layernorm_epsilon", "init_method_std", "rotary_base"),
    *("normalization", "activation", "bias", "position_embedding_type", "make_vocab_size_divisible_by"),
    *("share_embeddings_and_output_weights", "mcore_gpt", "precision", "target"),
)


def test_archive_opens_with_nemo_and_holds_its_files(shared_dir: Path, tmp_path: Path) -> None:
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    source = shared_dir / "nemo_ckpts" / "hf_llama_bf16"
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "m.nemo"), "--quiet"]) == 0
    SaveRestoreConnector._unpack_nemo_file(str(tmp_path / "m.nemo"), str(tmp_path))
    with tarfile.open(tmp_path / "m.nemo", "r:") as archive:
        names = archive.getnames()
    assert {"./model_config.yaml", "./model_weights/.metadata", "./model_weights/common.pt"} <= set(names)
    weights = tmp_path / "model_weights"
    sample = shared_dir / "nemo_ckpts" / "nemo2_llama_bf16" / "weights" / "metadata.json"
    assert json.loads((weights / "metadata.json").read_text()) == json.loads(sample.read_text())
    assert torch.load(weights / "common.pt", weights_only=True) == {}
    config = yaml.safe_load((tmp_path / "model_config.yaml").read_text())
    artifact = config["tokenizer"]["model"].removeprefix("nemo:")
    assert (tmp_path / artifact).read_bytes() == (source / "tokenizer.model").read_bytes()
    written = yaml.safe_load(
        (shared_dir / "nemo_ckpts" / "nemo1_llama_bf16" / "model_config.extracted.yaml").read_text()
    )
    for key in _SAME_AS_NVIDIA:
        assert config[key] == written[key], key
    entries = _plain_torch_read(weights)
    assert entries.keys() == {key.replace("module.", "model.") for key in _plain_torch_read(sample.parent)}


def test_nemo_config_of_mistral_as_nvidia_writes_it() -> None:
    architecture = architecture_from_hf(tiny.config("mistral_v01").to_dict())
    config = nemo_config(architecture, "bf16", {})
    assert config["window_size"] == [16, 0]
    assert config["encoder_seq_length"] == 16
    assert config["max_position_embeddings"] == 256
    assert nemo_config(architecture_from_hf(tiny.config("llama3").to_dict()), "32", {})["precision"] == 32


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_configs_lose_nothing(family: str) -> None:
    architecture = architecture_from_hf(tiny.config(family).to_dict())
    assert architecture_from_hf(architecture_to_hf(architecture)) == architecture
    back = architecture_from_nemo(nemo_config(architecture, "bf16", {}), architecture.vocab_size, "model_config.yaml")
    # Without a sliding window NeMo's config does not tell a Mistral from a Llama; they are the same model.
    assert {**vars(back), "model_type": ""} == {**vars(architecture), "model_type": ""}
    if architecture.sliding_window:
        assert back.model_type == "mistral"


@pytest.mark.parametrize("family", ["llama31", "mistral_v01", "smollm2", "qwen25", "qwen3_tied"])
def test_made_up_config_is_understood_by_transformers(family: str) -> None:
    from transformers import AutoConfig

    original = tiny.config(family)
    settings = architecture_to_hf(architecture_from_hf(original.to_dict()))
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    for key in ("rope_parameters", "tie_word_embeddings", "sliding_window", "num_key_value_heads"):
        assert getattr(made, key, None) == getattr(original, key, None), key
    # Older versions of transformers leave it unset.
    assert made.head_dim == (
        getattr(original, "head_dim", None) or original.hidden_size // original.num_attention_heads
    )


def _write_state(source: Path, directory: Path, prefix: str) -> None:
    sink = DirectorySink(directory)
    architecture = read_architecture(source)
    write_distributed_checkpoint(
        sink, "state", HuggingFaceSource(source), architecture, prefix=prefix, dtype=torch.float32
    )
    sink.close()


def test_training_checkpoint(tmp_path: Path) -> None:
    source = tiny.save("smollm2", tmp_path / "hf")
    step = tmp_path / "step_0000010"
    _write_state(source, step, "model.")
    (step / "architecture.json").write_bytes((source / "config.json").read_bytes())
    (step / "config.yaml").write_text("name: run\ndata: {chat_template: null, system_prompt: null}\n")
    (step / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (step / "tokenizer" / name).write_bytes((source / name).read_bytes())
    found = _convert_back(step, tmp_path / "back")
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(found[name], tensor), name
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    given, exported = (json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "back"))
    # What transformers 4.57 would not read; the tiny model's base stands in tiny_models.py.
    assert given.pop("rope_parameters")["rope_theta"] == 100000.0
    assert exported == {**given, "rope_theta": 100000.0, "rope_scaling": None}
    given, exported = (
        json.loads((place / "tokenizer_config.json").read_text()) for place in (source, tmp_path / "back")
    )
    assert exported == {**given, "tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("prefix", ["model.", "module.", ""])
def test_bare_checkpoint_with_config(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.save("mistral_v03", tmp_path / "hf")
    _write_state(source, tmp_path / "bare", prefix)
    bare = tmp_path / "bare" / "state"
    assert nemo_to_hf(["--input", str(bare), "--output", str(tmp_path / "back"), "--quiet"]) == 1
    assert "--config" in capsys.readouterr().err
    found = _convert_back(bare, tmp_path / "back", "--config", str(source))
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(found[name], tensor), name
    assert (tmp_path / "back" / "tokenizer.json").exists()


def test_padded_vocabulary_comes_back_unpadded(tmp_path: Path) -> None:
    """A checkpoint whose embedding was padded for tensor parallelism, with and without a config that says so."""
    source = tiny.save("llama3", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    state: dict[str, torch.Tensor] = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded = torch.cat([tensors[name], torch.full((512 - 259, 64), 9.0)])
        state[name] = padded
    _write_state(source, tmp_path / "plain", "model.")
    stored = _plain_torch_read(tmp_path / "plain" / "state")
    stored["model.embedding.word_embeddings.weight"] = state["model.embed_tokens.weight"]
    stored["model.output_layer.weight"] = state["lm_head.weight"]
    dcp.save(stored, checkpoint_id=tmp_path / "padded", no_dist=True)
    found = _convert_back(tmp_path / "padded", tmp_path / "back", "--config", str(source))
    assert found["lm_head.weight"].shape == (259, 64)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_foreign_nemo_with_padding_is_cut_to_the_tokenizer(shared_dir: Path, tmp_path: Path) -> None:
    """Rows that padding to 128 x TP explains go; the SentencePiece model of the sample has 512 pieces."""
    sample = shared_dir / "nemo_ckpts" / "nemo1_llama_bf16" / "llama_bf16.nemo"
    with tarfile.open(sample) as archive:
        archive.extractall(tmp_path / "nemo", filter="data")
    stored = _plain_torch_read(tmp_path / "nemo" / "model_weights")
    extra = torch.ones(256, 64, dtype=torch.bfloat16)
    for key in ("model.embedding.word_embeddings.weight", "model.output_layer.weight"):
        stored[key] = torch.cat([stored[key], extra])
    for file in (tmp_path / "nemo" / "model_weights").iterdir():
        file.unlink()
    dcp.save(stored, checkpoint_id=tmp_path / "nemo" / "model_weights", no_dist=True)
    config = yaml.safe_load((tmp_path / "nemo" / "model_config.yaml").read_text())
    for tensor_parallel, rows in ((6, 768), (3, 768), (1, 768)):
        config["tensor_model_parallel_size"] = tensor_parallel
        (tmp_path / "nemo" / "model_config.yaml").write_text(yaml.safe_dump(config))
        expected = 512 if -(-512 // (128 * tensor_parallel)) * 128 * tensor_parallel == rows else rows
        assert open_model(tmp_path / "nemo").architecture.vocab_size == expected


def test_numbered_layers_are_read_too(tmp_path: Path) -> None:
    """megatron-core stores layers apart, each under its number, when they are not all alike."""
    source = tiny.save("llama2", tmp_path / "hf")
    _write_state(source, tmp_path / "plain", "model.")
    apart: dict[str, object] = {}
    for key, tensor in _plain_torch_read(tmp_path / "plain" / "state").items():
        if "decoder.layers." not in key:
            apart[key] = tensor
            continue
        for layer, part in enumerate(tensor):
            apart[key.replace("layers.", f"layers.{layer}.")] = part.clone()
    apart["optimizer.state.exp_avg.model.embedding.word_embeddings.weight"] = torch.zeros(3)
    dcp.save(apart, checkpoint_id=tmp_path / "apart", no_dist=True)
    found = _convert_back(tmp_path / "apart", tmp_path / "back", "--config", str(source))
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(found[name], tensor), name


def test_unpickling_of_plan_records_is_inert(tmp_path: Path) -> None:
    from nemo_lmpo.formats.safe_metadata import read_metadata

    source = tiny.save("llama2", tmp_path / "hf")
    _write_state(source, tmp_path / "plain", "model.")
    metadata = FileSystemReader(tmp_path / "plain" / "state").read_metadata()
    content = (tmp_path / "plain" / "state" / ".metadata").read_bytes()
    found = read_metadata(io.BytesIO(content), "test")
    assert found.state_dict_metadata == metadata.state_dict_metadata
    assert found.storage_data == metadata.storage_data


def _nemo2(**config: object) -> dict[str, object]:
    base = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 512}
    return {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel",
        "config": {**base, "layernorm_epsilon": 1e-5, "rotary_base": 5e5, "vocab_size": 300, **config},
    }


def test_nemo2_settings() -> None:
    scaled = architecture_from_nemo2(
        _nemo2(scale_factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=8192), 384, "model.yaml"
    )
    assert scaled.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert (scaled.vocab_size, scaled.num_query_groups, scaled.head_dim) == (300, 4, 16)
    mistral = {
        **_nemo2(window_size=[64, 0], vocab_size=None, kv_channels=24, share_embeddings_and_output_weights=True),
        "_target_": "nemo.collections.llm.gpt.model.mistral.MistralModel",
    }
    found = architecture_from_nemo2(mistral, 384, "model.yaml")
    assert (found.model_type, found.sliding_window, found.vocab_size, found.head_dim) == ("mistral", 64, 384, 24)
    assert found.tie_word_embeddings
    linear = architecture_from_nemo2(_nemo2(seq_len_interpolation_factor=4.0), 384, "model.yaml")
    assert linear.rope_scaling == RopeScaling("linear", 4.0)


def test_other_nemo_models_are_refused() -> None:
    gemma = {**_nemo2(), "_target_": "nemo.collections.llm.gpt.model.gemma.GemmaModel"}
    with pytest.raises(CheckpointError, match="GemmaModel' is not supported; supported: LlamaModel, MistralModel"):
        architecture_from_nemo2(gemma, 300, "model.yaml")
    config = nemo_config(architecture_from_hf(tiny.config("llama3").to_dict()), "bf16", {})
    for name, value in (
        ("activation", "gelu"),
        ("normalization", "layernorm1p"),
        ("bias", True),
        ("multi_latent_attention", True),
    ):
        with pytest.raises(CheckpointError, match="supported"):
            architecture_from_nemo({**config, name: value}, 259, "model_config.yaml")
    for name in ("num_layers", "max_position_embeddings"):
        broken = {key: value for key, value in config.items() if key != name}
        with pytest.raises(CheckpointError, match=f"the field {name} is missing"):
            architecture_from_nemo(broken, 259, "model_config.yaml")


def test_tokenizer_from_elsewhere(shared_dir: Path, tmp_path: Path) -> None:
    other = tiny.save("llama2", tmp_path / "other")
    sample = shared_dir / "nemo_ckpts" / "nemo2_llama_bf16"
    _convert_back(sample, tmp_path / "hf", "--tokenizer", str(other))
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    assert not (tmp_path / "hf" / "tokenizer.model").exists()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 512
