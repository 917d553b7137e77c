"""Every combination that would fail or be wrong is refused before any work, with field, value and remedy."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from typing import Any

import pytest
import torch

from nemo_lmpo.config.coerce import alternatives, as_far_as_known, collect, types_of
from nemo_lmpo.config.loss_section import collect_loss
from nemo_lmpo.config.recipe import compose, load_recipe
from nemo_lmpo.config.rules import LAYOUT_RULES, SETTING_RULES, ParallelLayout, check_settings, validate
from nemo_lmpo.config.rules.settings import VALIDATION_METRICS
from nemo_lmpo.config.schema import Config, DatasetConfig
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.rows.parse import parse_preference
from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.formats.architecture import Architecture, architecture_from_hf
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.training.pair_metrics import PairMetrics, pair_columns
from tests.unit.composed import recipe

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 96,
    "intermediate_size": 100,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
MIXTURE: dict[str, Any] = {
    **SHAPE,
    **{"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 30, "norm_topk_prob": True},
}
"""The model of cases whose name begins with `mixture`."""
# Overrides, number of processes, and what the message must hold: field and value, then the remedy.
BAD: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    **{
        f"{name}_zero": ((f"{name}=0",), 1, (f"{name}=0", "at least 1"))
        for name in (
            "model.tensor_model_parallel_size",
            "model.pipeline_model_parallel_size",
            "model.context_parallel_size",
            "model.expert_model_parallel_size",
            "model.expert_tensor_parallel_size",
            "model.global_batch_size",
            "model.micro_batch_size",
            "model.make_vocab_size_divisible_by",
            "model.logprob_chunk_tokens",
            "model.activations_checkpoint_num_layers",
            "trainer.devices",
            "trainer.num_nodes",
            "trainer.num_threads",
            "trainer.max_steps",
            "trainer.max_epochs",
            "checkpoint.keep_last",
            "data.max_prompt_length",
        )
    },
    "group_off": (("model.peft.rank=8",), 1, ("model.peft.rank=8 has no effect while model.peft.name is unset", "set")),
    "released_prompt": (
        ("data.compat=released_code", "data.prompt_from=generation_prompt"),
        1,
        ("data.prompt_from=generation_prompt has no effect", "remove"),
    ),
    "template_date": (
        ("data.template_date=26.7.2024",),
        1,
        ("data.template_date='26.7.2024' is not a day", "2026-12-01"),
    ),
    **{
        f"{name}_negative": ((f"{name}=-1",), 1, (f"{name}=-1", "must be at least 0"))
        for name in (
            "optim.lr",
            "optim.weight_decay",
            "optim.sched.min_lr",
            "trainer.gradient_clip_val",
            "trainer.val_check_interval",
            "checkpoint.save_interval",
            "checkpoint.keep_best",
        )
    },
    "modules_that_are_not_recomputed": (
        ("model.recompute_modules=[core_attn]",),
        1,
        ("model.recompute_modules=['core_attn']", "granularity=selective"),
    ),
    "no_module_to_recompute": (
        ("model.recompute_modules=[]", "model.activations_checkpoint_granularity=selective"),
        1,
        ("model.recompute_modules=[]", "give mlp or core_attn"),
    ),
    "gathering_without_sharing": (
        ("optim.overlap_param_gather=true",),
        1,
        ("optim.overlap_param_gather=true", "use_distributed_optimizer=true", "overlap_grad_reduce=true"),
    ),
    "gathering_twice": (
        ("optim.overlap_param_gather=true", "model.fsdp=true"),
        1,
        ("optim.overlap_param_gather=true", "model.fsdp=true", "remove it"),
    ),
    "fp8_of_float32": (
        ("model.fp8=tensorwise", "trainer.precision='32'"),
        1,
        ("model.fp8=tensorwise", "precision=bf16"),
    ),
    "fp8_without_its_layers": (
        ("model.fp8=hybrid", "model.transformer_engine=false"),
        1,
        ("model.fp8=hybrid", "model.transformer_engine=false"),
    ),
    "fp8_of_odd_sizes": (
        ("model.fp8=tensorwise", "trainer.precision=bf16"),
        1,
        ("intermediate_size over tensor parallelism is 100", "by 16"),
    ),
    "collectives_of_whole_sequences": (
        ("model.tp_comm_overlap=true",),
        1,
        ("model.tp_comm_overlap=true", "sequence_parallel=true"),
    ),
    "rows_of_many_lengths": (
        ("model.tp_comm_overlap=true", "logging.samples=2"),
        1,
        ("model.tp_comm_overlap=true", "logging.samples=2", "one length"),
    ),
    "offloading_what_all_have": (
        ("optim.cpu_offload=true",),
        1,
        ("optim.cpu_offload=true", "optim.use_distributed_optimizer=true"),
    ),
    "offloading_rounded_moments": (
        ("optim.cpu_offload=true", "optim.use_distributed_optimizer=true", "optim.moments_dtype=bf16"),
        1,
        ("optim.cpu_offload=true", "optim.moments_dtype=bf16", "remove one"),
    ),
    "profile_backwards": (("trainer.profile=[3,2]",), 1, ("trainer.profile=[3, 2]", "as [10,12]")),
    "too_few_processes": (("model.tensor_model_parallel_size=2",), 1, ("1 processes", "size=2", "a multiple of 2")),
    "processes_do_not_divide": (
        ("model.tensor_model_parallel_size=2", "model.context_parallel_size=2"),
        6,
        ("6 processes", "tensor_model_parallel_size=2", "context_parallel_size=2", "a multiple of 4"),
    ),
    "batch_over_replicas": (("model.global_batch_size=10",), 4, ("global_batch_size=10", "size 4", "multiple of 4")),
    "heads_over_tensor": (
        ("model.tensor_model_parallel_size=8",),
        8,
        ("tensor_model_parallel_size=8", "num_attention_heads=12", "choose a divisor"),
    ),
    "groups_over_tensor": (
        ("model.tensor_model_parallel_size=12",),
        12,
        ("tensor_model_parallel_size=12", "num_key_value_heads=4", "choose a divisor"),
    ),
    "mlp_over_tensor": (
        ("model.tensor_model_parallel_size=3",),
        3,
        ("tensor_model_parallel_size=3", "intermediate_size=100", "choose a divisor"),
    ),
    "sequence_parallel_alone": (("model.sequence_parallel=true",), 1, ("sequence_parallel=true", "at least 2")),
    "layers_over_stages": (
        ("model.pipeline_model_parallel_size=5",),
        5,
        ("pipeline_model_parallel_size=5", "12 layers", "choose a divisor of 12"),
    ),
    "virtual_without_stages": (
        ("model.virtual_pipeline_model_parallel_size=2",),
        1,
        ("virtual_pipeline_model_parallel_size=2", "at least 2", "unset it"),
    ),
    "shared_weights_in_stages": (
        ("model.fsdp=true", "model.pipeline_model_parallel_size=2"),
        2,
        ("model.fsdp=true", "pipeline_model_parallel_size=2", "set it to 1", "use_distributed_optimizer=true"),
    ),
    "mixture_experts_over_ranks": (
        ("model.expert_model_parallel_size=3",),
        3,
        ("expert_model_parallel_size=3", "8 experts", "choose a divisor"),
    ),
    "mixture_width_over_ranks": (
        ("model.expert_tensor_parallel_size=4",),
        4,
        ("expert_tensor_parallel_size=4", "inner size 30", "choose a divisor"),
    ),
    "mixture_on_processes": (
        ("model.expert_model_parallel_size=4",),
        2,
        ("2 processes", "expert_model_parallel_size=4", "start a multiple of 4"),
    ),
    "mixture_tensor_without_sequence": (
        ("model.tensor_model_parallel_size=2",),
        2,
        ("tensor_model_parallel_size=2", "sequence_parallel=true", "set it"),
    ),
    "mixture_in_fp8": (
        ("model.fp8=tensorwise", "trainer.precision=bf16"),
        1,
        ("model.fp8=tensorwise", "mixture of experts", "remove it"),
    ),
    "mixture_fsdp": (
        ("model.fsdp=true", "model.expert_model_parallel_size=2"),
        2,
        ("model.fsdp=true", "same experts", "model.expert_model_parallel_size=1", "or model.fsdp=false"),
    ),
    "mixture_adapters": (
        ("model.peft.name=lora", "model.peft.target_modules=[q_proj,up_proj,gate_proj]"),
        1,
        (
            "['q_proj', 'up_proj', 'gate_proj']",
            "peft does not load",
            "gate_proj, up_proj, down_proj, or down_proj alone",
        ),
    ),
    "mixture_adapters_of_mixtral": (
        ("model.peft.name=lora", "model.peft.target_modules=[w1,w2,w3]"),
        1,
        ("names 'w1'", "a qwen3_moe does not have", "write gate_proj"),
    ),
    "no_experts": (
        ("model.expert_model_parallel_size=2",),
        2,
        ("expert_model_parallel_size=2", "a llama has no experts", "leave it out"),
    ),
    "no_routers": (("model.moe_freeze_router=true",), 1, ("moe_freeze_router=true", "no experts", "leave it out")),
    "no_term": (
        ("model.moe_aux_loss_coefficient=0.1",),
        1,
        ("moe_aux_loss_coefficient=0.1", "no effect", "set model.moe_aux_loss too"),
    ),
    "one_virtual_stage": (
        ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=1"),
        2,
        ("virtual_pipeline_model_parallel_size=1", "at least 2", "unset it"),
    ),
    "layers_over_virtual_stages": (
        ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=4"),
        2,
        ("virtual_pipeline_model_parallel_size=4", "12 layers", "choose a divisor of 12"),
    ),
    "recomputed_units_over_layers": (
        ("model.activations_checkpoint_granularity=full", "model.activations_checkpoint_num_layers=5"),
        1,
        ("activations_checkpoint_num_layers=5", "12 layers", "method=uniform", "choose a divisor of 12"),
    ),
    "recomputed_units_over_layers_of_a_virtual_stage": (
        (
            "model.activations_checkpoint_granularity=full",
            "model.activations_checkpoint_num_layers=2",
            "model.pipeline_model_parallel_size=2",
            "model.virtual_pipeline_model_parallel_size=2",
        ),
        2,
        ("activations_checkpoint_num_layers=2", "3 layers", "choose a divisor of 3"),
    ),
    "prompt_fills_everything": (
        ("data.max_prompt_length=64",),
        1,
        ("data.max_prompt_length=64", "data.max_length=64", "lower it"),
    ),
    "longer_than_positions": (
        ("data.max_length=129", "data.row_tokens=null"),
        1,
        ("data.max_length=129", "max_position_embeddings=128", "lower it"),
    ),
    "row_too_small": (("data.row_tokens=95",), 1, ("data.row_tokens=95", "data.max_length=64", "at least 128")),
    "row_too_small_for_two_prompts": (
        ("data.row_tokens=127", "data.share_prompt=false"),
        1,
        ("data.row_tokens=127", "at least 128"),
    ),
    "reference_without_use": (
        ("model.reference_in_memory=true",),
        1,
        ("model.reference_in_memory=true", "loss.name=lmpo", "remove it"),
    ),
    "warmup_takes_all": (("optim.sched.warmup_fraction=1",), 1, ("warmup_fraction=1.0", "less than 1")),
    "floor_above_rate": (("optim.lr=1e-4", "optim.sched.min_lr=1e-3"), 1, ("min_lr=0.001", "optim.lr=0.0001", "lower")),
    "epochs_beside_steps": (
        ("trainer.max_epochs=3",),
        1,
        ("trainer.max_epochs=3", "trainer.max_steps=100", "set trainer.max_steps=null"),
    ),
    "three_betas": (("optim.betas=[0.9,0.99,0.999]",), 1, ("optim.betas=[0.9, 0.99, 0.999]", "two numbers")),
    "beta_one": (("optim.betas=[0.9,1.0]",), 1, ("optim.betas=[0.9, 1.0]", "less than 1")),
    "no_epsilon": (("optim.eps=0",), 1, ("optim.eps=0.0", "greater than 0")),
    "not_a_number": (("optim.lr=nan",), 1, ("optim.lr=nan", "must be a finite number")),
    "infinite": (("optim.weight_decay=inf",), 1, ("optim.weight_decay=inf", "must be a finite number")),
    "rate_that_ruins": (("optim.lr=1e30",), 1, ("optim.lr=1e+30", "at most 1")),
    "seed_of_too_many_bits": (
        ("model.seed=18446744073709551616",),
        1,
        ("model.seed=18446744073709551616", "at most 9223372036854775807"),
    ),
    "threads_of_no_machine": (("trainer.num_threads=999999999999",), 1, ("num_threads=999999999999", "at most 1024")),
    "huge_vocabulary": (("model.make_vocab_size_divisible_by=999999999999",), 1, ("divisible_by=9", "at most 65536")),
    "loss_option_of_no_use": (("loss.log_h=1e30",), 1, ("loss.log_h=1e+30", "at most 1000000")),
    "empty_path": (("data.train.path=''",), 1, ("data.train.path=''", "must not be empty")),
    "empty_validation": (("data.validation.path=[]",), 1, ("data.validation.path=[]", "set it to null")),
    "no_rows": (("data.train.limit=0",), 1, ("data.train.limit=0", "at least 1", "unset it")),
    "weights_for_other_paths": (("data.train.weights=[1,2]",), 1, ("data.train.weights has 2 values for 1 paths",)),
    "encoding_of_nothing": (("data.train.encoding=utf-9",), 1, ("data.train.encoding='utf-9'", "cp1252")),
    "weights_of_nothing": (("data.train.weights=[0]",), 1, ("data.train.weights=[0.0]", "take no row")),
    "weight_that_is_none": (("data.train.weights=[nan]",), 1, ("data.train.weights=[nan]", "finite")),
    "endless_weight": (("data.train.weights=[1e30]",), 1, ("data.train.weights=[1e+30]", "at most 1000")),
    "patience_without_validation": (
        ("trainer.early_stopping_patience=2", "trainer.val_check_interval=0"),
        1,
        ("trainer.early_stopping_patience=2", "set data.validation.path and trainer.val_check_interval above 0"),
    ),
    "samples_of_nothing": (
        ("logging.samples=4", "data.validation.path=null"),
        1,
        ("logging.samples=4", "set data.validation.path, or logging.samples to 0"),
    ),
    "new_tokens_under_adapters": (
        ("data.add_special_tokens=['<|im_end|>']", "model.peft.name=lora"),
        1,
        ("data.add_special_tokens", "train the whole model"),
    ),
    "predict_without_conversations": (
        ("data.predict=last",),
        1,
        ("data.predict=last", "has an effect only with loss=sft"),
    ),
    "predict_all_leaves_no_prompt": (
        ("loss.name=sft", "data.predict=all", "logging.samples=2"),
        1,
        ("logging.samples=2", "set logging.samples=0, or data.predict=assistant"),
    ),
    "samples_without_number": (("logging.samples=129",), 1, ("logging.samples=129", "at most 128")),
    "samples_without_tokens": (("logging.sample_tokens=0",), 1, ("logging.sample_tokens=0", "at least 1")),
    "unknown_metric": (("checkpoint.monitor=val/los",), 1, ("checkpoint.monitor='val/los'", "choose val/loss")),
    "no_setting_to_change": (
        ("checkpoint.allow_changes=[optim.lrr]",),
        1,
        ("checkpoint.allow_changes names 'optim.lrr'", "did you mean optim.lr?"),
    ),
    "another_losss_metric": (("checkpoint.monitor=val/kto/z",), 1, ("checkpoint.monitor='val/kto/z'", "choose")),
    "name_that_climbs": (("name=a/../../b",), 1, ("name='a/../../b'", "folder's name")),
    "endless_name": ((f"run_dir=runs/{'x' * 300}",), 1, ("run_dir='runs/xxx", "255 bytes")),
    "adapters_on_nothing": (("model.peft.target_modules=[q_prj]",), 1, ("target_modules names 'q_prj'", "choose of")),
    "no_log_lines": (("logging.log_interval=0",), 1, ("logging.log_interval=0", "at least 1")),
    "nul_in_a_path": (("run_dir='a\x00b'",), 1, ("run_dir='a\\x00b'", "control characters")),
    "no_workers": (("data.num_workers=0",), 1, ("data.num_workers=0", "at least 1")),
    "hangs_without_stacks": (
        ("trainer.distributed_timeout=30",),
        1,
        ("trainer.distributed_timeout=30 minutes", "trainer.step_timeout=3600", "trainer.distributed_timeout=61"),
    ),
    "odd_duration": (("trainer.max_time_per_run=4h",), 1, ("trainer.max_time_per_run='4h'", "DD:HH:MM:SS")),
}


def collected(*overrides: str) -> tuple[Config, list[str]]:
    """The tiny recipe with overrides and what is wrong with single settings; rules were not asked."""
    raw, problems = compose("lmpo_tiny", overrides), list[str]()
    section = raw.pop("loss")
    config: Config = collect(Config, raw, unknown=lambda key, _: key, problems=problems)
    config.loss = collect_loss(section, problems)
    return config, problems


@pytest.mark.parametrize("case", BAD)
def test_is_refused(case: str) -> None:
    overrides, world_size, expected = BAD[case]
    with pytest.raises(ConfigError) as caught:
        validate(recipe("lmpo_tiny", *overrides), shape_of(case), world_size)
    assert any(all(part in line for part in expected) for line in str(caught.value).splitlines()), str(caught.value)


def shape_of(case: str) -> Architecture:
    """The model that a case of the table is about."""
    return architecture_from_hf(MIXTURE if case.startswith("mixture") else SHAPE)


def test_every_rule_is_in_the_table() -> None:
    tripped: set[Any] = set()
    for case, (overrides, world_size, _) in BAD.items():
        config, problems = collected(*overrides)
        tripped.update(rule for rule in SETTING_RULES if list(as_far_as_known(rule(config))))
        if not problems:
            layout = ParallelLayout(config, shape_of(case), world_size)
            tripped.update(rule for rule in LAYOUT_RULES if list(rule(layout)))
    assert tripped == {*SETTING_RULES, *LAYOUT_RULES}


EVERY_KIND = {
    "optim.lrr=1": "unknown key optim.lrr",
    "trainer.max_steps=few": "trainer.max_steps='few' is not a whole number",
    "trainer.precision=16": "trainer.precision=16 is unknown; choose bf16, 32",
    "optim.eps=0": "optim.eps=0.0 must be greater than 0",
    "loss.beta=0": "loss.beta=0.0 must be greater than 0",
    "loss.gama=1": "unknown key loss.gama",
    "loss.alpha=2": "loss.alpha=2.0 has an effect only with loss.margin=log",
    "optim.betas=[0.9]": "optim.betas=[0.9] must be two numbers",
    "name=a/b": "name='a/b' must be usable",
    "model.reference_in_memory=true": "model.reference_in_memory=true, but loss.name=lmpo",
}


def test_all_problems_are_told_at_once() -> None:
    """One wave: names, types, choices, bounds, the loss's options, and settings that do not go together."""
    with pytest.raises(ConfigError) as caught:
        load_recipe("lmpo_tiny", list(EVERY_KIND))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(EVERY_KIND), "\n".join(lines)
    for beginning in EVERY_KIND.values():
        assert any(line.startswith(beginning) for line in lines), beginning


def test_rules_pass_over_what_is_refused() -> None:
    """A prompt's length is not compared with a default that nobody asked for."""
    with pytest.raises(ConfigError) as caught:
        load_recipe("lmpo_tiny", ["data.max_length=long", "data.max_prompt_length=3000", "loss.name=odd"])
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == ["data.max_length", "loss.name"]


def test_configurations_made_in_programs_are_checked_too() -> None:
    config = load_recipe("lmpo_tiny")
    config.trainer.max_epochs = 0
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs=0"):
        check_settings(config)
    config = load_recipe("lmpo_tiny")
    config.data.max_length, config.model.sequence_parallel = 129, True
    config.data.row_tokens = None
    with pytest.raises(ConfigError) as caught:
        validate(config, architecture_from_hf(SHAPE), 1)
    assert len(str(caught.value).splitlines()) == 2


def test_metrics_of_validation_are_those_that_runs_have() -> None:
    columns = pair_columns(build_loss(load_recipe("sft_tiny").loss))
    assert set(PairMetrics(columns, 1, torch.device("cpu")).metrics()) == set(VALIDATION_METRICS)


def test_schemas_are_those_of_the_reader() -> None:
    (known,) = [of for key, of in types_of(DatasetConfig).items() if key == "schema"]
    for schema in typing.get_args(known):  # one that it does not know would be a KeyError
        with contextlib.suppress(RowError):
            parse_preference({"prompt": "Q", "chosen": "a", "rejected": "b"}, schema)


def test_heads_that_do_not_divide_into_groups() -> None:
    with pytest.raises(UserError, match=r"num_attention_heads=12 is not a multiple of num_key_value_heads=5"):
        validate(load_recipe("lmpo_tiny"), architecture_from_hf({**SHAPE, "num_key_value_heads": 5}), 1)


def test_a_model_of_no_machine() -> None:
    with pytest.raises(UserError, match=r"parameters \(hidden_size=2000000000.*correct it"):
        validate(load_recipe("lmpo_tiny"), architecture_from_hf({**SHAPE, "hidden_size": 2_000_000_000}), 1)


def test_a_good_layout_knows_its_replicas() -> None:
    overrides = ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=3"]
    layout = validate(load_recipe("lmpo_tiny", overrides), architecture_from_hf(SHAPE), 24)
    assert layout.model_parallel_size == 6
    assert layout.data_parallel_size == 4


def groups() -> dict[str, Any]:
    """The configuration's groups by dotted name."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", Config)]
    while waiting:
        prefix, cls = waiting.pop()
        for name, kind in types_of(cls).items():
            if dataclasses.is_dataclass(kind):
                found[f"{prefix}{name}"] = kind
                waiting.append((f"{prefix}{name}.", kind))
    return found


def test_no_setting_of_a_group_that_is_off_is_ignored() -> None:
    other = {int: 3, float: 0.25, str: "x", list[str]: ["q_proj"], bool: True}
    switched = {
        group: next((of.name for of in dataclasses.fields(kind) if of.metadata.get("switch")), None)
        for group, kind in groups().items()
    }
    # a recipe's validation is turned off by its path alone, and nothing of it reaches what is trained
    off = {group for group, kind in groups().items() if "off unless" in (kind.__doc__ or "").lower()}
    assert off == {group for group, switch in switched.items() if switch} == {
        "model.peft", "logging.wandb", "logging.mlflow"
    }  # fmt: skip
    for group in off:
        for name, kind in types_of(groups()[group]).items():
            if name == switched[group]:
                continue
            value = next(other[option] for option in alternatives(kind) if option in other)
            with pytest.raises(
                ConfigError, match=f"{group}.{name}=.* has no effect while {group}.{switched[group]} is"
            ):
                recipe("lmpo_tiny", f"{group}.{name}={value}".replace("'", ""))


def test_one_name_may_stand_for_a_list_of_one() -> None:
    config = recipe("lmpo_tiny", "model.peft.name=lora", "model.peft.target_modules=all-linear")
    assert config.model.peft.target_modules == ["all-linear"]
