"""Every combination of layouts for mixtures, with and without the term that balances experts, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.mixture_runs import EP, FSDP, TP, assert_equal_runs, balance, run

CP, PP = ("model.context_parallel_size=2",), ("model.pipeline_model_parallel_size=2",)
VPP = (*PP, "model.virtual_pipeline_model_parallel_size=2")
ETP, OPTIMIZER = ("model.expert_tensor_parallel_size=2",), ("optim.use_distributed_optimizer=true",)
OVERLAP = (*OPTIMIZER, "optim.overlap_grad_reduce=true")
RECOMPUTE = ("model.activations_checkpoint_granularity=full",)
MIXTRAL = (
    *("model.architecture.model_type=mixtral", "model.architecture.num_local_experts=8"),
    *("model.architecture.intermediate_size=48", "model.architecture.sliding_window=null"),
)
PLAIN = ("model.architecture.norm_topk_prob=false", "model.architecture.num_experts_per_tok=3")
LAYERS = ("model.architecture.num_hidden_layers=4",)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one_pair_a_row": (1, ("model.micro_batch_size=1",)),
    "prompt_twice": (1, ("data.share_prompt=false",)),
    "recompute": (1, RECOMPUTE),
    "dp2": (2, ()),
    "dp2_ep2": (2, EP),
    "dp2_ep2_optimizer": (2, (*EP, *OPTIMIZER)),
    "dp4_ep2_overlap_recompute": (4, (*EP, *OVERLAP, *RECOMPUTE)),
    "dp4_ep4_optimizer": (4, ("model.expert_model_parallel_size=4", *OPTIMIZER)),
    "tp2": (2, TP),
    "tp2_etp2": (2, (*TP, *ETP)),
    "tp2_ep2": (2, (*TP, *EP)),
    "tp2_dp2_ep4_optimizer": (4, (*TP, "model.expert_model_parallel_size=4", *OPTIMIZER)),
    "tp2_dp2_etp2_ep2_overlap": (4, (*TP, *EP, *ETP, *OVERLAP)),
    "dp2_etp2": (2, ETP),
    "dp2_fsdp": (2, FSDP),
    "tp2_dp2_etp2_fsdp_recompute": (4, (*TP, *ETP, *FSDP, *RECOMPUTE)),
    "cp2": (2, CP),
    "cp2_ep2_optimizer": (2, (*CP, *EP, *OPTIMIZER)),
    "cp2_tp2_ep4": (4, (*CP, *TP, "model.expert_model_parallel_size=4")),
    "pp2": (2, PP),
    "pp2_dp2_ep2_optimizer": (4, (*PP, *EP, *OPTIMIZER)),
    "pp2_tp2_ep2": (4, (*PP, *TP, *EP)),
    "vpp2_ep2": (4, (*VPP, *EP)),
    "vpp2_recompute": (2, (*VPP, *RECOMPUTE)),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[tuple[str, ...], Path] = {}

    def found(settings: tuple[str, ...]) -> Path:
        if settings not in done:
            done[settings] = run(1, tmp_path_factory.mktemp("one") / "run", (*LAYERS, *settings))
        return done[settings]

    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "plain", "mixtral"])
@pytest.mark.parametrize("kind", [None, "global_batch", "sequence"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_one_process(layout: str, kind: str | None, family: str, one_process: Any, tmp_path: Path) -> None:
    size, overrides = LAYOUTS[layout]
    settings = {"qwen3_moe": (), "plain": PLAIN, "mixtral": MIXTRAL}[family] + (() if kind is None else balance(kind))
    found = run(size, tmp_path / "run", (*LAYERS, *settings, *overrides))
    assert_equal_runs(found, one_process(settings))
