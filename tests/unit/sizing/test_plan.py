"""The planner against arithmetic done by hand, against published runs, and against the rules of a run."""

from __future__ import annotations

import itertools
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

import nemo_lmpo
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import validate
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.architecture import architecture_from_hf
from nemo_lmpo.sizing.cards import CARDS, Card, Machine, peak_flops, read_gpus
from nemo_lmpo.sizing.describe_plan import describe_plan
from nemo_lmpo.sizing.flops import Shape
from nemo_lmpo.sizing.memory import estimate_memory
from nemo_lmpo.sizing.rank_work import RowSize, Split, attention_flops, further_passes, head_work, layer_work, split_of
from nemo_lmpo.sizing.search import CONTEXT, FRAGMENTATION, Candidate, granularities, rank_layouts
from nemo_lmpo.sizing.step_time import (
    MicroBatchTime,
    communication_seconds,
    micro_batch_time,
    rate_of,
    step_of,
    step_time,
)
from nemo_lmpo.sizing.typical_rows import filling_lengths, row_of, rows_of_data, step_rows, typical_row
from nemo_lmpo.sizing.uncertainty import fast_end, shares, slow_end
from tests.unit.sizing.published import PUBLISHED, computed_speed, error, published_speed, table

SHAPE = Shape(layers=4, hidden=512, ffn=1024, query=512, key_value=256, vocabulary=4096)
ROW = RowSize(tokens=256, predicted=128, attended=1000)
A100 = CARDS["a100"]
DOCS = Path(nemo_lmpo.__file__).parent.parent / "docs"


def test_products_of_a_layer() -> None:
    """Two operations a weight and token forward, and twice as many backward."""
    weights = 512 * (512 + 256) + 512 * 512 + 512 * 2048 + 1024 * 512
    assert SHAPE.layer_weights == weights
    whole = layer_work(SHAPE, Split(), ROW)
    assert whole.flops == 6 * weights * 256
    parted = layer_work(SHAPE, Split(tensor=4, context=2, sequence_parallel=True), ROW)
    assert parted.flops == whole.flops / 8
    assert layer_work(SHAPE, Split(recompute=True), ROW).flops == 8 * weights * 256


def test_products_of_the_head() -> None:
    """Logits are computed twice, so four products instead of three."""
    assert head_work(SHAPE, Split(), ROW).flops == 8 * 4096 * 512 * 128


def test_attention_forward_and_backward() -> None:
    """Two products of 512 channels a pair forward, five backward; two operations a multiply-add; four layers."""
    assert attention_flops(SHAPE, Split(), ROW) == 4 * 7 * 2 * 512 * 1000


def test_a_further_forward_pass() -> None:
    """A third of a step's products and two of seven in attention; logits are computed once more, not twice."""
    once = Split(passes=1)
    assert layer_work(SHAPE, once, ROW).flops * 6 == layer_work(SHAPE, Split(), ROW).flops * 8
    assert head_work(SHAPE, once, ROW).flops == 10 * 4096 * 512 * 128
    assert attention_flops(SHAPE, once, ROW) * 7 == attention_flops(SHAPE, Split(), ROW) * 9
    parted = layer_work(SHAPE, Split(tensor=4, sequence_parallel=True, passes=1), ROW)
    assert sum(parted.calls.values()) == 10 + 4


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ((), []),
        (("loss.compat=released_code",), ["statistics before the losses"]),
        (("loss.compat=released_code", "loss.z_score=false"), []),
        (("loss=dpo",), []),  # computed once before training
        (("loss=dpo", "model.reference_in_memory=true"), ["the reference model"]),
        (("loss=kto",), ["statistics before the losses"]),
        (("loss=kto", "model.reference_in_memory=true"), ["statistics before the losses", "the reference model"]),
    ],
)
def test_which_losses_go_forward_more_often(settings: tuple[str, ...], passes: list[str]) -> None:
    config = load_recipe("lmpo_llama3_8b", settings)
    assert further_passes(config) == passes
    assert config.model.architecture is not None
    text = describe_plan(config, architecture_from_hf(config.model.architecture), read_gpus("4"))
    assert [line for line in text.splitlines() if line.startswith("with one more forward pass")] == [
        f"with one more forward pass per step, for {what}" for what in passes
    ]


def test_what_sequence_parallelism_sends() -> None:
    """Ten collectives of the BF16 hidden states, of which each of four ranks sends three quarters."""
    work = layer_work(SHAPE, Split(tensor=4, sequence_parallel=True), ROW)
    assert sum(work.sent.values()) == 10 * 2 * 256 * 512 * 3 // 4
    assert sum(work.calls.values()) == 10


def test_the_bubble_of_a_pipeline() -> None:
    """(stages - 1) micro-batches of waiting, divided by the virtual stages."""
    stages = Split(pipeline=4, fused=True)
    micro = MicroBatchTime(2.0, 1.0, host_bound=False)
    time = step_of(SHAPE, stages, micro, micro, 8, A100)
    assert (time.compute, time.communicate, time.bubble) == (16.0, 8.0, 9.0)
    assert step_of(SHAPE, replace(stages, virtual=3), micro, micro, 8, A100).bubble == 3.0


def test_groups_use_the_network_they_cross() -> None:
    inside, outside = A100.link * A100.collectives, A100.network * A100.collectives
    assert rate_of(4, 1, A100) == inside
    assert rate_of(2, 8, A100) == outside, "neighbors on different nodes"
    assert rate_of(8, 4, A100) == 2 * outside, "two members a node share its network cards"


def test_twice_the_gpus_never_take_longer() -> None:
    """More replicas: half of the micro-batches each."""
    seconds = [
        step_time(SHAPE, Split(data=ranks, shard="optimizer", overlap=True), ROW, 16 // ranks, Machine(A100, 1)).total
        for ranks in (1, 2, 4, 8)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_published_runs() -> None:
    """One number a card was fitted, on one run each; all the others are predictions."""
    predicted = [abs(error(run)) for run in PUBLISHED if not run.fitted]
    assert len(predicted) >= 10
    assert statistics.median(predicted) < 0.08
    assert max(predicted) < 0.17
    assert all(abs(error(run)) < 0.02 for run in PUBLISHED if run.fitted)


@pytest.mark.skipif(not DOCS.is_dir(), reason="an installed package has no docs folder")
def test_the_documentation_shows_these_runs() -> None:
    assert table() in (DOCS / "performance.md").read_text()


@pytest.mark.parametrize(
    ("text", "card", "node", "nodes"),
    [
        ("4", "A100 80 GB SXM", 4, 1),
        ("64xH100", "H100 80 GB SXM", 8, 8),
        ("16x4xA100", "A100 80 GB SXM", 4, 16),
        ("8xa100-pcie", "A100 80 GB SXM, PCIe", 8, 1),
        ("2x8xh200-ethernet", "H200 141 GB SXM, Ethernet", 8, 2),
        ("8xh200-nvl", "H200 NVL", 8, 1),
        ("64xH800-pcie-200g", "H800 PCIe, 200g", 8, 8),
        ("72xGB200", "GB200 NVL72", 4, 18),
        ("8xRTX-PRO-6000", "RTX PRO 6000 Blackwell", 8, 1),
    ],
)
def test_gpus(text: str, card: str, node: int, nodes: int) -> None:
    machine = read_gpus(text)
    assert (machine.card.name, machine.card.node, machine.nodes) == (card, node, nodes)


@pytest.mark.parametrize(
    "text", ["", "0", "0x8xA100", "4xV100", "12", "four", "-4", "8xa100-token", "8xh100-0g", "1x2x3x4"]
)
def test_gpus_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^GPUS={text} "):
        read_gpus(text)


@pytest.mark.parametrize(
    ("text", "gigabit"), [("64xh100", 400), ("64xh100-200g", 200), ("64xh100-1600g/node", 200), ("16x4xa100-400g", 400)]
)
def test_networks(text: str, gigabit: float) -> None:
    machine = read_gpus(text)
    assert machine.card.network * 8 == gigabit * 1e9
    assert machine.network_is_known == text.endswith(("g", "node"))
    slow = slow_end(machine).card.network * 8
    assert slow == (gigabit if machine.network_is_known else gigabit / 2) * 1e9
    assert fast_end(machine).card.network == machine.card.network


@pytest.mark.parametrize("key", CARDS)
def test_a_cards_figures_are_those_of_its_cuda_name(key: str) -> None:
    """The name says peak and architecture; FP8 runs at twice BF16's rate, and from Hopper on."""
    card = CARDS[key]
    assert card.peak == peak_flops(card.name)
    assert card.peak_fp8 == pytest.approx(0 if key == "a100" else 2 * card.peak, rel=0.01)
    assert card.before_blackwell == key.startswith(("a", "h"))


def test_published_runs_lie_between_fast_and_slow() -> None:
    """All but one, of 1 T parameters over 64 stages."""
    outside = [
        run.name
        for run in PUBLISHED
        if not computed_speed(run, slow_end) <= published_speed(run) <= computed_speed(run, fast_end)
    ]
    assert outside == ["GPT 1T"]


def test_what_decides_a_step() -> None:
    """Of a step of 6 s of products, 3 of memory and 1 that nothing changes; and of one at the network's edge."""
    card = CARDS["h100"]

    def seconds(other: Card) -> float:
        return 6 * card.products / other.products + 3 * card.bandwidth / other.bandwidth + 1

    found = dict(shares(seconds, card))
    assert found == pytest.approx({"tensor cores": 0.6, "memory": 0.3, "host": 0, "links in a node": 0, "network": 0})
    assert list(found)[:2] == ["tensor cores", "memory"]
    edge = dict(shares(lambda other: max(10.0, 10 * card.network / other.network), card))
    assert edge["network"] == pytest.approx(1.0), "hidden as long as it is not slower"


def test_fsdp_hides_nothing_of_tensor_parallelism_before_blackwell() -> None:
    """Megatron-LM: TP's overlap wants CUDA_DEVICE_MAX_CONNECTIONS=1, FSDP's another value; Blackwell needs neither."""
    for card, sharded in itertools.product((CARDS["h100"], CARDS["b200"]), ("all", "optimizer")):
        split = Split(tensor=4, data=2, sequence_parallel=True, shard=sharded)
        work = layer_work(SHAPE, split, ROW)
        all_of_it = communication_seconds(work, "tensor", rate_of(4, 1, card), card)
        hidden = 0.0 if sharded == "all" and card.before_blackwell else 0.4
        assert micro_batch_time(work, 0.0, split, card).communicate == pytest.approx((1 - hidden) * all_of_it)


def test_gradients_are_added_inside_of_products_with_transformer_engine() -> None:
    """Eight bytes a weight, the float32 sum read and written; a kernel of its own reads two more, and a BF16 product
    wrote them.
    """
    for overrides, each in (([], 8), (["model.transformer_engine=false"], 10)):
        config = load_recipe("lmpo_llama3_8b", overrides)
        assert config.model.architecture is not None
        layout = validate(config, architecture_from_hf(config.model.architecture), 4)
        assert layer_work(SHAPE, split_of(layout), ROW).moved["gradients"] == each * SHAPE.layer_weights // 2


SEVENTY_B = (
    "model.global_batch_size=512",
    "model.architecture.hidden_size=8192",
    "model.architecture.intermediate_size=28672",
    "model.architecture.num_hidden_layers=80",
    "model.architecture.num_attention_heads=64",
)


def plan_of_70b(gpus: str) -> str:
    config = load_recipe("lmpo_llama3_8b", SEVENTY_B)
    assert config.model.architecture is not None
    return describe_plan(config, architecture_from_hf(config.model.architecture), read_gpus(gpus))


def test_the_plan_says_how_sure_it_is() -> None:
    """70 B on 64 x H100 by the audit's arithmetic: FSDP's traffic just hides at 400 Gbit/s and not at 200."""
    text = plan_of_70b("64xh100")
    lines = text.splitlines()
    assert "network: 400 Gbit/s a GPU, at the slow end 200; name yours: GPUS=...-200g" in lines
    sharded = next(line for line in lines if "FSDP  " in line)
    fast, slow = map(float, re.findall(r"([\d.]+) to ([\d.]+)", sharded)[0])
    assert slow > 2 * fast
    assert "network 9" in sharded, "it decides about all of the step there"
    pipeline = next(line for line in lines if "PP 4" in line)
    fast, slow = map(float, re.findall(r"([\d.]+) to ([\d.]+)", pipeline)[0])
    assert slow < 1.5 * fast
    assert "tensor cores" in pipeline
    (network,) = [line for line in lines if line.startswith("  network, Gbit/s a GPU: 25 to")]
    assert network.endswith("FSDP"), "where the network is fast"
    assert any("Megatron-LM warns" in line for line in lines)
    assert any(line.startswith("the first at the slow end (") for line in lines)


def test_a_slow_network_takes_fsdp_off_the_first_places() -> None:
    text = plan_of_70b("64xh100-200g")
    assert "network: 200 Gbit/s a GPU\n" in text
    assert "FSDP  " not in text.split("and 4")[0]


def test_pairs_fill_a_row() -> None:
    for overrides in ([], ["data.share_prompt=false"], ["data.row_tokens=8192"], ["model.micro_batch_size=1"]):
        config = load_recipe("lmpo_llama3_8b", overrides)
        share = config.data.share_prompt
        pairs = max(1, config.data.row_budget // ((150 if share else 300) + 280 + 243 - 2))
        pairs = min(pairs, config.model.micro_batch_size or pairs)
        filled = pairs * filling_lengths(config).tokens(share_prompt=share)
        assert config.data.row_budget - pairs <= filled <= config.data.row_budget


def test_the_step_holds_all_pairs() -> None:
    config = load_recipe("lmpo_llama3_8b", ["data.row_tokens=4096"])
    rows, row = step_rows(config, data_parallel=2)
    assert rows == -(-64 // 6)
    assert rows * row.tokens == pytest.approx(64 * (150 + 280 + 243 - 2), rel=1e-3)


def test_conversations_are_planned_as_conversations() -> None:
    """Lengths by hand, and what packing makes of such rows; every position of a row but a target is fed once."""
    config = load_recipe("sft_llama3_8b_ultrachat", ["data.row_tokens=4096"])
    conversation = typical_row(config)
    tokens = 185 + 1075 - 1
    assert conversation.tokens(share_prompt=True) == conversation.tokens(share_prompt=False) == tokens
    assert rows_of_data(config) == 4096 // tokens == 3
    rows, row = step_rows(config, data_parallel=2)
    assert rows == -(-64 // 3)
    assert rows * row.tokens == pytest.approx(64 * tokens, rel=1e-3)
    assert rows * row.predicted == pytest.approx(64 * 990, rel=1e-3)
    assert row_of(config, 1).attended == tokens * (tokens + 1) // 2
    whole = row_of(load_recipe("sft_llama3_8b_ultrachat", ["data.predict=all"]), 1)
    assert (whole.tokens, whole.predicted, whole.attended) == (tokens, tokens, row_of(config, 1).attended)
    last = row_of(load_recipe("sft_llama3_8b_ultrachat", ["data.predict=last"]), 1)
    assert (last.tokens, last.predicted) == (tokens, round(990 / 3.16))


@pytest.mark.parametrize(
    ("recipe", "overrides", "told"),
    [
        ("lmpo_llama3_8b", (), "pairs of 150 + 280 + 243 tokens (prompt, chosen, rejected; UltraFeedback's means)"),
        ("lmpo_llama3_8b", ("data.train.schema=conversation",), "pairs of"),  # which it will refuse
        (
            "sft_llama3_8b",
            (),
            "pairs of 150 + 280 + 243 tokens (prompt, chosen, rejected; UltraFeedback's means); for conversations give "
            "data.train.schema=conversation",
        ),
        ("sft_llama3_8b", ("data.train.schema=instruction",), "conversations of"),
        (
            "sft_llama3_8b_ultrachat",
            (),
            "conversations of 185 + 1075 tokens (prompt, all behind it, 990 of them predicted; UltraChat's means)",
        ),
    ],
)
def test_the_plan_says_what_rows_it_assumes(recipe: str, overrides: tuple[str, ...], told: str) -> None:
    config = load_recipe(recipe, overrides)
    assert config.model.architecture is not None
    lines = describe_plan(config, architecture_from_hf(config.model.architecture), read_gpus("4")).splitlines()
    (line,) = [line for line in lines if line.startswith("assumed: ")]
    assert line.startswith(f"assumed: {told}")
    kind = told.split()[0]
    assert f"128 {kind} per step" in lines[0]
    (head,) = [line for line in lines if line.startswith("  layout ")]
    assert f" {kind}/s " in head


def test_every_layout_is_one_that_runs_and_fits() -> None:
    """Its overrides, given to the recipe, are a valid run of the memory that the table says."""
    config = load_recipe("lmpo_llama3_8b")
    assert config.model.architecture is not None
    architecture, machine = architecture_from_hf(config.model.architecture), read_gpus("4")
    candidates = rank_layouts(config, architecture, machine)
    times = [candidate.time.total for candidate in candidates]
    assert times == sorted(times)
    for candidate in candidates[:5]:
        again = load_recipe("lmpo_llama3_8b", candidate.overrides())
        layout = validate(again, architecture, machine.gpus)
        assert estimate_memory(layout).total == candidate.memory
        assert candidate.memory * FRAGMENTATION + CONTEXT <= 80e9
    text = describe_plan(config, architecture, machine)
    assert " ".join(candidates[0].overrides()) in text


def test_a_model_that_fits_nowhere_is_refused() -> None:
    config = load_recipe("lmpo_llama3_8b")
    assert config.model.architecture is not None
    with pytest.raises(ConfigError, match="no layout of lmpo_llama3_8b fits 1 x A100"):
        rank_layouts(config, architecture_from_hf(config.model.architecture), read_gpus("1"))


def plan_of_8b(gpus: str, *overrides: str) -> list[Candidate]:
    config = load_recipe("lmpo_llama3_8b", overrides)
    assert config.model.architecture is not None
    return rank_layouts(config, architecture_from_hf(config.model.architecture), read_gpus(gpus))


WEIGHTS = 8_030_261_248
"""Of Llama 3 8B, by its publisher."""


def first_of_tp2(*overrides: str) -> Candidate:
    """TP 2 x DP 2 with rows of 8,192 tokens, on 4 x A100."""
    wanted = {"model.tensor_model_parallel_size=2", "data.row_tokens=8192", "optim.use_distributed_optimizer=true"}
    found = plan_of_8b("4", *overrides)
    return next(
        each
        for each in found
        if wanted <= set(each.overrides())
        and each.layout.data_parallel_size == 2
        and each.layout.config.model.activations_checkpoint_granularity is None
    )


def test_what_the_optimizer_on_the_host_takes_and_frees() -> None:
    """By hand: 12 bytes a weight of a quarter; 28 bytes at 200 GB/s of four GPUs against 60 at 80 % of 2,039."""
    plain, offloaded = first_of_tp2(), first_of_tp2("optim.cpu_offload=true")
    assert plain.memory - offloaded.memory == pytest.approx(12 * WEIGHTS / 4, rel=1e-3)
    host, gpu = 28 * 4 * WEIGHTS / 4 / 200e9, 60 * WEIGHTS / 4 / (0.8 * 2.039e12)
    assert offloaded.time.total - plain.time.total == pytest.approx(host - gpu, rel=1e-3)


def test_what_gathering_behind_forward_frees() -> None:
    """By hand: half of the rank's BF16 weights from the other replica, at 75 % of NVLink's 300 GB/s."""
    plain, overlapped = first_of_tp2(), first_of_tp2("optim.overlap_param_gather=true")
    assert plain.memory == overlapped.memory
    seconds = 2 * (WEIGHTS / 2) / 2 / (0.75 * 300e9)
    assert plain.time.total - overlapped.time.total == pytest.approx(seconds, rel=1e-3)


def test_overlap_inside_of_products_pads_rows() -> None:
    """Transformer Engine's buffers have one shape: 64 pairs in 6 rows leave an eighth of 8,192 tokens empty."""
    plain, padded = (
        step_rows(load_recipe("lmpo_llama3_8b", ["data.row_tokens=8192", *more]), 2)
        for more in ([], ["model.tp_comm_overlap=true"])
    )
    assert plain[0] == padded[0] == 6
    assert (plain[1].tokens, padded[1].tokens) == (round(64 * 671 / 6), 8192)
    assert plain[1].predicted == padded[1].predicted


def test_8b_on_one_gpu_with_the_optimizer_on_the_host() -> None:
    """By hand: 6 bytes a weight, and rows of 4,096 tokens whose activations are kept. Its overrides are a valid run."""
    first = plan_of_8b("1", "optim.cpu_offload=true")[0]
    config = first.layout.config
    assert (config.data.row_tokens, config.model.activations_checkpoint_granularity) == (4096, None)
    inside = 4 * 4096 + (4096 + 2 * 1024 + 2 * 4096) + 3 * 14336
    logits = 128256 * (1024 * (4 + 2) + 4096 * 2)
    assert first.memory == pytest.approx(6 * WEIGHTS + 32 * inside * 4096 * 2 + logits, rel=1e-3)
    again = load_recipe("lmpo_llama3_8b", ["optim.cpu_offload=true", *first.overrides()])
    assert estimate_memory(validate(again, first.layout.architecture, 1)).total == first.memory


def test_fp8_is_refused_on_a_card_without_it() -> None:
    told = (
        "^model.fp8=hybrid needs a GPU with FP8 .H100 or newer., and A100 80 GB SXM has none; unset it, or plan for "
        "another card, as GPUS=1x4xH100$"
    )
    with pytest.raises(ConfigError, match=told):
        plan_of_8b("4", "model.fp8=hybrid")
    assert plan_of_8b("4xH100", "model.fp8=hybrid")[0].time.total < plan_of_8b("4xH100")[0].time.total


def test_what_the_plan_recomputes() -> None:
    """All there is for a dense model; no MLP of a mixture, by the rules; and modules that are named."""
    for recipe, overrides, kinds in (
        ("lmpo_llama3_8b", (), {None, "selective", "full"}),
        ("lmpo_mixtral_8x7b", (), {None, "full"}),
        ("lmpo_llama3_8b", NAMED, {"selective"}),
    ):
        config = load_recipe(recipe, overrides)
        assert config.model.architecture is not None
        assert set(granularities(config, architecture_from_hf(config.model.architecture))) == kinds
    assert plan_of_8b("4", *NAMED), "valid in itself"


NAMED = ("model.activations_checkpoint_granularity=selective", "model.recompute_modules=[core_attn]")
