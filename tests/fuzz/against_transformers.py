"""Hugging Face directories, each changed in one place, read by transformers and by this project.

transformers is the oracle: where it loads a directory, this project computes the same logits from the same tensors, or
refuses in one sentence; and it does not refuse a change that makes no difference to transformers. Which fields are
tried follows from the installed transformers: every field of the families' config classes, and every name that the code
of these families reads. So a field that a newer version brings is found by itself.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nemo_lmpo.convert.megatron import megatron_model, model_logits
from nemo_lmpo.errors import UserError
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.conversion import tensor_names
from nemo_lmpo.formats.families import FAMILIES
from nemo_lmpo.formats.model_files import ModelFiles, open_model
from tests.unit.formats import tiny_models as tiny

MODELS = ("llama3", "llama31", "mistral_v01", "qwen25", "qwen3", "smollm2")
LENGTH = 300
"""Tokens of the prompt: beyond every window (16), original context (64) and context (256) of the tiny models."""
TOLERANCE = 1e-4
SHARDED: dict[str, Any] = {"max_shard_size": "100KB"}


@dataclass(frozen=True)
class Change:
    """One way in which a directory differs from what `save_pretrained` wrote."""

    name: str
    model: str
    make: Callable[[Path], None]
    fields: dict[str, Any] = field(default_factory=dict)
    """The fields of the config that are changed, if it is they; else the weights are."""
    length: int = LENGTH
    must_load: bool = False
    """Refusing it is a fault, though it changes what the model computes."""

    def __str__(self) -> str:
        return f"{self.model}: {self.name}"


NEEDLESS = {
    r"partial_rotary_factor": "transformers 4 rotates that part of each head, 5 ignores it",
    r"tie_word_embeddings=true": "the output layer differs: transformers 4 takes the embedding for it, 5 does not",
    r"(max_position_embeddings|head_dim)=0": "a size that is none",
    r"initializer_range=2.0": "a standard deviation that is none",
    r"an integer buffer": "tensors that the model does not have are refused",
    r"model_type": "a family that is not in the table; its config is that of another model",
    r"per_layer_config|rope_[a-z]+=.\"full_attention": "settings of single layers, which this family does not have",
    r"is_causal=null": "it depends on the kernel what that is",
    r"sliding_window=absent": "the window is 4096 then, which the prompt does not reach",
}
"""Changes that are refused though they make no difference to transformers, and why."""
LENIENT = {
    "(eos_token_id|num_labels|output_attentions|return_dict)=": "what is put in and out, not what is computed",
    "(base_model_[a-z]+_plan|fusion_config|experts_implementation|mtp_layer_types|sub_configs)=": "not the model's",
    "qwen2.*head_dim=null": "hidden_size / num_attention_heads, as if it were absent",
    r"quantization_config=": "the weights are there in full precision; transformers wants to quantize them",
    r"mistral.*sliding_window=null.*(full_attention|layer_types=null)": "full attention; transformers wants a window",
}
"""Changes that are loaded though transformers does not load them, and why."""


# What the two make of a directory ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Computed:
    """What a reader computes, or why it loads nothing."""

    refusal: str = ""
    logits: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def prompt(vocabulary: int, length: int) -> list[int]:
    """Ids by a formula."""
    return [(7919 * position + 13) % vocabulary for position in range(length)]


@torch.no_grad()
def by_transformers(directory: Path, length: int) -> Computed:
    """What the installed transformers computes; a model with weights that it had to invent counts as refused."""
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, local_files_only=True
        )
        invented = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
        if invented:
            return Computed(f"weights that are not there: {', '.join(invented)[:200]}")
        ids = prompt(model.config.vocab_size, length)
        logits = model.eval()(torch.tensor([ids]), use_cache=False).logits[0]
    except Exception as error:  # whatever it raises, it does not load the model
        return Computed(f"{type(error).__name__}: {str(error)[:300]}")
    tensors = dict(model.state_dict())
    # With adapters beside them, weights are no longer those of the model.
    return Computed(logits=logits, tensors={} if any("lora_" in name for name in tensors) else tensors)


class Ours:
    """What this project computes; equal architectures on the same weights are computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Architecture, int], Tensor] = {}

    def __call__(self, directory: Path, length: int, weights: str = "") -> Computed:
        """``weights`` names weights that are the same in several directories; empty: nothing is known of them."""
        try:
            files = open_model(directory)
        except UserError as error:
            return Computed(str(error))
        key = (weights, files.architecture, length)
        logits = self._known[key] if weights and key in self._known else self._logits(files, length)
        if weights:
            self._known[key] = logits
        return Computed(logits=logits, tensors={name: files.source.get(name) for name in tensor_names(files)})

    @staticmethod
    def _logits(files: ModelFiles, length: int) -> Tensor:
        with megatron_model(files.architecture, files.source) as model:
            return model_logits(model, prompt(files.architecture.vocab_size, length))


@dataclass
class Judge:
    """Compares the two readers on changed copies of models that transformers saved below ``root``."""

    root: Path
    ours: Ours = field(default_factory=Ours)
    before: dict[tuple[str, int], Computed] = field(default_factory=dict)
    """What transformers computes of the unchanged models."""
    refused: dict[str, list[str]] = field(default_factory=dict)
    """Changes that are refused, and alter what the model computes, by field."""

    def whole(self, model: str) -> Path:
        """The model as transformers saves it: small files and an index, or one file."""
        directory = self.root / model
        if not directory.exists():
            tiny.save(model.removesuffix("_sharded"), directory, **(SHARDED if model.endswith("_sharded") else {}))
        return directory

    def __call__(self, change: Change) -> str | None:
        """What is wrong with how this project takes the change; None: nothing."""
        whole, copy = self.whole(change.model), self.root / "changed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        change.make(copy)
        with quiet():
            try:
                ours = self.ours(copy, change.length, change.model if change.fields else "")
            except Exception as error:  # a traceback is a finding
                return f"a traceback: {type(error).__name__}: {str(error)[:200]}"
            theirs = by_transformers(copy, change.length)
            nulls = [name for name, value in change.fields.items() if value is None]
            if nulls and theirs.refusal.startswith("StrictDataclassField") and not ours.refusal:
                # Version 5 is strict about types, 4 is not; null says nothing.
                _edit(copy, dict.fromkeys(nulls, _ABSENT))
                theirs = by_transformers(copy, change.length)
            if (change.model, change.length) not in self.before:
                self.before[change.model, change.length] = by_transformers(whole, change.length)
            return self._verdict(change, ours, theirs)

    def _verdict(self, change: Change, ours: Computed, theirs: Computed) -> str | None:
        if ours.refusal and theirs.refusal:
            return _sentence(ours.refusal)
        if theirs.refusal:
            return None if _among(LENIENT, change) else f"loaded, but transformers refuses it ({theirs.refusal})"
        if ours.refusal:
            if change.must_load:
                return f"refused, but transformers loads it ({ours.refusal})"
            same = _largest(theirs.logits, self.before[change.model, change.length].logits) == 0.0
            if same and not _among(NEEDLESS, change):
                return f"refused, but it makes no difference to transformers ({ours.refusal})"
            self.refused.setdefault("+".join(change.fields) or change.name, []).append(ours.refusal)
            return _sentence(ours.refusal)
        different = [
            name
            for name, tensor in ours.tensors.items()
            if theirs.tensors and not _equal(tensor, theirs.tensors.get(name))
        ]
        if different:
            return f"other tensors: {', '.join(different)[:200]}"
        difference = _largest(ours.logits, theirs.logits)
        return None if difference <= TOLERANCE else f"other logits: {difference:.3g}"


def _equal(ours: Tensor, theirs: Tensor | None) -> bool:
    return theirs is not None and torch.equal(ours.float(), theirs)


def _among(table: dict[str, str], change: Change) -> bool:
    return any(re.search(pattern, str(change)) for pattern in table)


def _largest(left: Tensor | None, right: Tensor | None) -> float:
    if left is None or right is None or left.shape != right.shape:
        return float("inf")
    difference = (left - right).abs().max()
    return float("inf") if bool(difference.isnan()) else float(difference)


def _sentence(refusal: str) -> str | None:
    """A refusal is one sentence (and a list of tensors below it), and not an exception's name."""
    first = refusal.split("\n")[0]
    if len(first) > 600 or re.search(r"Traceback|\bKeyError|\bTypeError|\bAttributeError", refusal):
        return f"refused with: {refusal[:300]}"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


# Fields of the config ---------------------------------------------------------------------------------------------

_ABSENT = object()
_LAYERS = 4
_SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPES: tuple[Any, ...] = (
    *({}, {"rope_type": "default"}, {"rope_theta": 5000.0}, {"rope_type": "default", "rope_theta": 2e4}),
    *({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 3.0, "rope_theta": 5e3}, _SCALED),
    {**_SCALED, "original_max_position_embeddings": 32, "rope_theta": 1e5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 3e4}},
    {"rope_type": None},
    {"rope_theta": None},
    {"rope_type": "default", "type": "linear", "factor": 2.0},
    {"rope_type": "default", "mrope_section": [2, 3, 3]},
)
_FULL, _SLIDING = ["full_attention"] * _LAYERS, ["sliding_attention"] * _LAYERS
_MIXED = ["full_attention", "sliding_attention"] * (_LAYERS // 2)
VALUES: dict[str, tuple[Any, ...]] = {
    "rope_parameters": _ROPES,
    "rope_scaling": _ROPES,
    "layer_types": (_FULL, _SLIDING, _MIXED, ["attention"] * _LAYERS, _FULL[1:], []),
    "hidden_act": ("gelu", "swish", "SiLU", "relu"),
    "dtype": ("bfloat16", "float16", "float64"),
    "torch_dtype": ("bfloat16",),
    "model_type": ("mistral", "llama", "qwen2", "qwen3", "ministral", "gemma", "qwen2_moe"),
    "architectures": (["LlamaForSequenceClassification"], ["Unknown"], []),
    "per_layer_config": ({"1": {"sliding_window": 4}}, {"0": {"intermediate_size": 48}}, {}),
    "quantization_config": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}),
    "transformers_weights": ("other.safetensors", "model.safetensors"),
    "is_causal": (True, False),
    "num_key_value_heads": (1, 2, 4, None),
    "vocab_size": (100,),
    "num_hidden_layers": (2, 5),
    "hidden_size": (128,),
    "use_sliding_window": (True,),
}
"""Where values of the field's type would say little. An absent field and null are tried for every field."""
_BY_TYPE: dict[Any, tuple[Any, ...]] = {
    bool: (True, False),
    int: (0, 1, 3, 8),
    float: (0.0, 0.5, 2.0),
    str: ("something",),
    list: ([], ["full_attention"] * _LAYERS),
    dict: ({}, {"factor": 2.0}),
}
_READ = (
    r"\bconfig\.([a-z]\w+)\b(?!\()",
    r"getattr\((?:self\.)?config, \"([a-z]\w+)\"",
    r"(?:getattr|hasattr)\(self, \"([a-z]\w+)\"",
)
_TAKEN = r"kwargs\.(?:pop|get)\(\"([a-z]\w+)\""
"""Fields that are not of a class, in the constructors of configs; elsewhere these are arguments of functions."""
_CONFIGS = ("configuration_utils.py", "modeling_rope_utils.py")
_MODELS = ("modeling_utils.py", "masking_utils.py")


def fields_of_transformers() -> dict[str, tuple[Any, ...]]:
    """Every field that transformers may read of a supported family's config, with values to try."""
    found: dict[str, set[Any]] = {name: set() for name in VALUES}
    for model_type in FAMILIES:
        for entry in dataclasses.fields(CONFIG_MAPPING[model_type]):
            found.setdefault(entry.name, set()).update(_types(entry.type))
    package = Path(transformers.__file__).parent
    families = [path for name in FAMILIES for path in (package / "models" / name).glob("*.py")]
    configs = [package / name for name in _CONFIGS] + [path for path in families if "configuration" in path.name]
    models = [package / name for name in _MODELS] + [path for path in families if "modeling" in path.name]
    for paths, patterns in ((configs, (*_READ, _TAKEN)), (models, _READ)):
        text = "\n".join(path.read_text() for path in paths)
        for pattern in patterns:
            for name in re.findall(pattern, text):
                found.setdefault(name, {bool, int, float, str})
    return {
        name: VALUES.get(name) or tuple(value for kind in sorted(kinds, key=str) for value in _BY_TYPE.get(kind, ()))
        for name, kinds in sorted(found.items())
    }


def _types(annotation: Any) -> set[Any]:
    parts = typing.get_args(annotation) or (annotation,)
    return {typing.get_origin(part) or part for part in parts}


def _edit(directory: Path, values: dict[str, Any], name: str = "config.json") -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(values)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not _ABSENT}))


def with_fields(model: str, values: dict[str, Any], *, length: int = LENGTH, must_load: bool = False) -> Change:
    """A change of some fields of the config."""
    told = ", ".join(f"{k}={'absent' if v is _ABSENT else json.dumps(v)[:60]}" for k, v in values.items())
    return Change(told, model, lambda directory: _edit(directory, values), values, length, must_load)


def field_changes() -> Iterator[Change]:
    """Every field of transformers, with every value, in every family."""
    for name, values in fields_of_transformers().items():
        for model in MODELS:
            for value in (*values, None, _ABSENT):
                yield with_fields(model, {name: value})


def combined_changes() -> Iterator[Change]:
    """Fields that decide together: of the rotary embedding in its four places, and of the window."""
    for model in MODELS:
        for parameters in (_ABSENT, {}, {"rope_theta": 5e3}, {**_SCALED, "original_max_position_embeddings": 32}):
            for scaling in (None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}, _SCALED):
                for more in ({}, {"rope_theta": 7e4}, {"original_max_position_embeddings": 48}):
                    yield with_fields(model, {"rope_parameters": parameters, "rope_scaling": scaling, **more})
    for model in ("mistral_v01", "qwen25", "qwen3", "llama3"):
        for use in (True, False, _ABSENT):
            for window in (8, None, _ABSENT):
                for first in (0, 2, 28, None, _ABSENT):
                    for kinds in (_ABSENT, None, _FULL, _SLIDING, _MIXED):
                        if model in ("mistral_v01", "llama3") and (use, first) != (True, 0):
                            continue  # these two decide nothing there
                        values = {"use_sliding_window": use, "sliding_window": window, "max_window_layers": first}
                        yield with_fields(model, {**values, "layer_types": kinds})
    yield with_fields("mistral_v01", {"sliding_window": _ABSENT}, length=4200, must_load=True)


# Weight files -----------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def _rewrite(change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> Callable[[Path], None]:
    """Changes the tensors of `model.safetensors`."""

    def make(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        tensors = change(tensors) or tensors
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS, {"format": "pt"}
        )

    return make


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*-of-*.safetensors"))


def _index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((directory / INDEX).read_text())
    change(content)
    (directory / INDEX).write_text(json.dumps(content))


def _single_beside_shards(directory: Path) -> None:
    """What is left where a model was saved over a larger one."""
    tensors = {name: tensor * 0.5 for path in _shards(directory) for name, tensor in load_file(path).items()}
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def _stale_index(directory: Path) -> None:
    (directory / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )


def _twice(factor: float) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        first, *_, last = _shards(directory)
        tensors, more = load_file(first), load_file(last)
        name = next(iter(tensors))
        save_file({**more, name: tensors[name] * factor}, last, {"format": "pt"})

    return make


def _misplaced(directory: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        places = index["weight_map"]
        name = next(iter(places))
        places[name] = next(file for file in places.values() if file != places[name])

    _index(directory, change)


def _phantom(directory: Path) -> None:
    _index(directory, lambda index: index["weight_map"].update({"x": _shards(directory)[0].name}))


def _unlisted(directory: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        gone = next(iter(index["weight_map"].values()))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}

    _index(directory, change)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {(new if name == old else name): tensor for name, tensor in tensors.items()}


def _added(**more: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in more.items()}}


def _copied(new: str, factor: float, old: str = "model.embed_tokens.weight") -> Callable[[Any], Any]:
    return lambda tensors: {**tensors, new: tensors[old] * factor}


def _without_format(directory: Path) -> None:
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS)


def _adapter(alone: bool) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        from peft import LoraConfig, get_peft_model

        model = AutoModelForCausalLM.from_pretrained(directory)
        base = directory / "base"
        if alone:
            base.mkdir()
            for path in (*directory.glob("*.safetensors"), directory / "config.json"):
                path.rename(base / path.name)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(directory)
        _edit(directory, {"base_model_name_or_path": str(base if alone else directory)}, "adapter_config.json")

    return make


def weight_changes() -> Iterator[Change]:
    """Files, names and tensors that other programs write, and mistakes."""
    frequencies = torch.ones(8)
    one_file: tuple[tuple[str, str, Callable[[Path], None], bool], ...] = (
        ("stale index beside the single file", "llama3", _stale_index, True),
        ("no format in the header", "llama3", _without_format, False),
        ("inv_freq of the model", "llama3", _rewrite(_added(model__rotary_emb__inv_freq=frequencies)), True),
        ("inv_freq of the model without prefix", "llama3", _rewrite(_added(rotary_emb__inv_freq=frequencies)), True),
        ("inv_freq of a layer", "llama3",
         _rewrite(_added(model__layers__0__self_attn__rotary_emb__inv_freq=frequencies)), True),
        ("an integer buffer", "llama3", _rewrite(_added(model__position_ids=torch.arange(4))), False),
        ("tied without prefix", "smollm2", _rewrite(_without_prefix), True),
        ("tied with a prefix of the output", "smollm2", _rewrite(_copied("model.lm_head.weight", 1.0)), True),
        ("untied without prefix", "llama3", _rewrite(_without_prefix), True),
        ("untied Qwen2 without prefix", "qwen25", _rewrite(_without_prefix), True),
        ("output layer under model.", "llama3", _rewrite(_renamed("lm_head.weight", "model.lm_head.weight")), True),
        ("embedding twice, equal", "llama3", _rewrite(_copied("embed_tokens.weight", 1.0)), True),
        ("embedding twice, different", "llama3", _rewrite(_copied("embed_tokens.weight", 0.5)), False),
        ("tied with an equal output layer", "smollm2", _rewrite(_copied("lm_head.weight", 1.0)), True),
        ("tied with another output layer", "smollm2", _rewrite(_copied("lm_head.weight", 0.5)), False),
        ("tied, output layer only", "smollm2",
         _rewrite(_renamed("model.embed_tokens.weight", "lm_head.weight")), True),
        ("untied without output layer", "llama3",
         _rewrite(lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"}), False),
        ("a norm is missing", "llama3",
         _rewrite(lambda tensors: {n: t for n, t in tensors.items() if n != "model.norm.weight"}), False),
        ("half precision", "llama3", _rewrite(lambda tensors: {n: t.half() for n, t in tensors.items()}), True),
        ("bfloat16", "qwen3", _rewrite(lambda tensors: {n: t.bfloat16() for n, t in tensors.items()}), True),
        ("float64 norms", "qwen25",
         _rewrite(lambda tensors: {n: t.double() if "norm" in n else t for n, t in tensors.items()}), True),
        ("an adapter beside the weights", "llama3", _adapter(alone=False), False),
        ("an adapter alone", "llama3", _adapter(alone=True), False),
    )  # fmt: skip
    sharded: tuple[tuple[str, Callable[[Path], None], bool], ...] = (
        ("a single file beside shards", _single_beside_shards, True),
        ("a tensor twice, equal", _twice(1.0), True),
        ("a tensor twice, different", _twice(0.5), False),
        ("a tensor in another shard than listed", _misplaced, True),
        ("a tensor is listed that no shard holds", _phantom, True),
        ("a shard is not listed", _unlisted, False),
        ("a shard is missing", lambda d: _shards(d)[0].unlink(), False),
    )  # fmt: skip
    for name, model, make, must_load in one_file:
        yield Change(name, model, make, must_load=must_load)
    for name, make, must_load in sharded:
        yield Change(name, "llama3_sharded", make, must_load=must_load)
