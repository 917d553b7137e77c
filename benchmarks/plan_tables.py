"""The plans that the documentation shows, made again: this prints them, and with `--write` puts them there.

Everything is computed by `dry_run=plan`'s own functions, in a minute, without a GPU. Tests hold the pages to it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import validate
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.architecture import Architecture, architecture_from_hf
from nemo_lmpo.runtime.files import GIB
from nemo_lmpo.sizing.cards import Machine, read_gpus
from nemo_lmpo.sizing.describe_plan import decided_by, layout_name
from nemo_lmpo.sizing.flops import shape_of
from nemo_lmpo.sizing.memory import estimate_memory
from nemo_lmpo.sizing.rank_work import split_of
from nemo_lmpo.sizing.search import Candidate, fits, layout_time, model_flops, rank_layouts
from nemo_lmpo.sizing.step_time import step_time
from nemo_lmpo.sizing.typical_rows import step_rows

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECIPE = "lmpo_llama3_8b"


def _architecture(hidden: int, ffn: int, layers: int, heads: int) -> tuple[str, ...]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return tuple(f"model.architecture.{name}={size}" for name, size in sizes.items())


LLAMA_70B, LLAMA_405B = _architecture(8192, 28672, 80, 64), _architecture(16384, 53248, 126, 128)
FP8 = "model.fp8=hybrid"
MLP = "model.activations_checkpoint_granularity=selective"
OVERLAP = "model.tp_comm_overlap=true"
FLAGS = (
    "optim.moments_dtype=bf16",
    "optim.overlap_param_gather=true",
    OVERLAP,
    "optim.cpu_offload=true",
    MLP,
)
"""Settings that a plan is made with, one at a time (docs/flags.md), in BF16 and in FP8. `model.recompute_modules` is
`[mlp]` where the last is set."""
NOTHING = "-"
"""In a cell that a rule or the memory leaves empty."""


@dataclass(frozen=True)
class Setup:
    """A model on a machine."""

    title: str
    gpus: str
    overrides: tuple[str, ...]


SETUPS = {
    "8b": Setup("8 B on 4 x A100, 128 pairs", "4", ()),
    "70b": Setup("70 B on 64 x H100, 512 pairs", "64xH100", ("model.global_batch_size=512", *LLAMA_70B)),
    "405b": Setup("405 B on 1,024 x H100, 2,048 pairs", "1024xH100", ("model.global_batch_size=2048", *LLAMA_405B)),
}
MIXTURES = {"Qwen3-30B-A3B": "lmpo_qwen3_30b_a3b", "Mixtral 8x7B": "lmpo_mixtral_8x7b"}
CARDS_OF_70B = ("A100", "H800", "H100", "H200", "B200", "GB200", "B300", "GB300")


@lru_cache(maxsize=64)
def plan(gpus: str, overrides: tuple[str, ...], recipe: str = RECIPE) -> tuple[list[Candidate], Machine]:
    """Layouts that fit, fastest first.

    Raises:
        ConfigError: none does, or the card cannot do it.
    """
    config, architecture = settings(overrides, recipe)
    machine = read_gpus(gpus)
    return rank_layouts(config, architecture, machine), machine


def settings(overrides: Sequence[str], recipe: str = RECIPE) -> tuple[Config, Architecture]:
    """A recipe and its model, without weights."""
    config = load_recipe(recipe, list(overrides))
    assert config.model.architecture is not None
    return config, architecture_from_hf(config.model.architecture)


def same_layout(first: Candidate, overrides: tuple[str, ...], machine: Machine) -> list[str]:
    """Memory and time of a layout with other settings; what its rules refuse, or what does not fit, has none."""
    try:
        layout = validate(*settings([*overrides, *first.overrides()]), machine.gpus)
    except ConfigError:
        return [NOTHING, NOTHING]
    memory = estimate_memory(layout).total
    if not fits(memory, machine):
        return [f"{memory / GIB:.1f}, too much", NOTHING]
    return [f"{memory / GIB:.1f}", f"{layout_time(layout, machine).total:.2f}"]


def cells(candidate: Candidate, machine: Machine) -> list[str]:
    """Row, memory, time with its range, speed, utilisation and what decides, as a table shows them."""
    mfu = model_flops(candidate) / (candidate.time.total * machine.gpus * machine.card.peak)
    return [
        str(candidate.layout.config.data.row_budget),
        f"{candidate.memory / GIB:.1f}",
        f"{candidate.time.total:.2f}",
        f"{candidate.fast:.2f} to {candidate.slow:.2f}",
        f"{candidate.examples_per_second:.1f}",
        f"{100 * mfu:.0f} %",
        decided_by(candidate, machine),
    ]


COLUMNS = ["row", "GiB", "step s", "fast to slow", "pairs/s", "MFU", "decided by"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        .replace("| --- |", "|---|")
        .replace(" --- |", "---|")
    )


def layouts_of_8b() -> str:
    """The first layouts of the 8 B recipes without context parallelism."""
    candidates, machine = plan("4", ())
    chosen = [each for each in candidates if each.layout.config.model.context_parallel_size == 1][:8]
    rows = [[layout_name(each), *cells(each, machine)] for each in chosen]
    return markdown(["4 x A100", *COLUMNS], rows)


def forward_passes() -> str:
    """What losses that go forward more often cost on the fastest layout."""
    rows = []
    for given, passes in (
        ("loss.compat=paper", 0),
        ("loss.compat=released_code", 1),
        ("loss=dpo model.reference_in_memory=true", 1),
        ("loss=kto model.reference_in_memory=true", 2),
    ):
        first = plan("4", tuple(given.split()))[0][0]
        rows.append([f"`{given}`", str(passes), f"{first.time.total:.2f}", f"{first.examples_per_second:.1f}"])
    return markdown(["", "forward passes more", "step s", "pairs/s"], rows)


def networks(setup: Setup) -> str:
    """A model's fastest layout; the first at the slow end, with or without FSDP, and on other networks."""
    candidates, machine = plan(setup.gpus, setup.overrides)
    safest = min(candidates, key=lambda each: each.slow)
    is_sharded = candidates[0].layout.config.model.fsdp
    other = next((each for each in candidates if each.layout.config.model.fsdp is not is_sharded), None)
    rows = [row_of_plan("BF16", candidates[0], machine), row_of_plan("first at the slow end", safest, machine)]
    rows.append(row_of_plan("without FSDP" if is_sharded else "with FSDP", other, machine))
    for rate in (200, 400, 800) if machine.nodes > 1 else ():
        found, on_it = plan(f"{setup.gpus}-{rate}g", setup.overrides)
        rows.append(row_of_plan(f"{rate} Gbit/s a GPU", found[0], on_it))
    return markdown([setup.title, "layout", *COLUMNS], rows)


def row_of_plan(what: str, found: Candidate | None, machine: Machine) -> list[str]:
    """A line of a table."""
    return [what, layout_name(found), *cells(found, machine)] if found else [what, "none fits", *[NOTHING] * 7]


def flags(setup: Setup) -> str:
    """A model in BF16 and FP8, without and with each flag: in the same layout, and in the fastest with it."""
    rows = []
    for numbers, given in (("BF16", ()), (FP8, (FP8,))):
        try:
            base, machine = plan(setup.gpus, setup.overrides + given)
        except ConfigError as error:
            rows.append([f"`{numbers}`", NOTHING, NOTHING, str(error).partition(";")[0], *[NOTHING] * 7])
            continue
        plain = plan(setup.gpus, setup.overrides)[0][0]
        same = same_layout(plain, setup.overrides + given, machine)
        rows.append([f"`{numbers}`" if given else numbers, *same, layout_name(base[0]), *cells(base[0], machine)])
        for flag in FLAGS:
            name = f"{'FP8, ' if given else ''}`{flag}`"
            rows.append([name, *with_flag(base[0], setup, (*given, flag))])
            if flag == OVERLAP:
                filled = full_rows(base[0], setup, (*given, flag), machine)
                rows.append([f"{name}, were rows full", NOTHING, f"{filled:.2f}", *[NOTHING] * 8])
    return markdown([setup.title, "same layout: GiB", "step s", "fastest layout", *COLUMNS], rows)


def with_flag(first: Candidate, setup: Setup, given: tuple[str, ...]) -> list[str]:
    """Cells of a line: the first layout without the flag, with it; and the layout that is the fastest with it."""
    found, machine = plan(setup.gpus, setup.overrides + given)
    if given[-1] == MLP:  # what is recomputed is the plan's own choice otherwise
        found = [each for each in found if each.layout.config.model.activations_checkpoint_granularity == "selective"]
    fastest = row_of_plan("", found[0] if found else None, machine)[1:]
    return [*same_layout(first, setup.overrides + given, machine), *fastest]


def full_rows(first: Candidate, setup: Setup, given: tuple[str, ...], machine: Machine) -> float:
    """Seconds of a step whose rows hold no padding, which `model.tp_comm_overlap` asks for otherwise."""
    layout = validate(*settings([*setup.overrides, *given, *first.overrides()]), machine.gpus)
    rows, row = step_rows(first.layout.config, first.layout.data_parallel_size)
    return step_time(shape_of(layout.architecture), split_of(layout), row, rows, machine).total


def worth() -> str:
    """What each flag changes in the fastest layout without it; FP8, which may not fit there, in its own fastest."""
    rows = {flag: [f"`{flag}`"] for flag in FLAGS}
    full, fp8 = [f"`{OVERLAP}`, were rows full"], [f"`{FP8}`, its own fastest layout"]
    for setup in SETUPS.values():
        candidates, machine = plan(setup.gpus, setup.overrides)
        first = candidates[0]
        for flag, row in rows.items():
            layout = validate(*settings([*setup.overrides, flag, *first.overrides()]), machine.gpus)
            gib = (estimate_memory(layout).total - first.memory) / GIB
            row.append(f"{gib:+.1f} GiB, {change(layout_time(layout, machine).total, first)}")
        full.append(f"{change(full_rows(first, setup, (OVERLAP,), machine), first)}")
        if not machine.card.peak_fp8:
            fp8.append(NOTHING)
            continue
        best = plan(setup.gpus, (*setup.overrides, FP8))[0][0]
        fp8.append(f"{(best.memory - first.memory) / GIB:+.1f} GiB, {change(best.time.total, first)}")
    machines = [re.sub(r", [\d,]+ pairs$", "", setup.title) for setup in SETUPS.values()]
    header = ["memory of a GPU, time of a step", *machines]
    return markdown(header, [*rows.values(), full, fp8])


def change(seconds: float, first: Candidate) -> str:
    """Of a step's time."""
    return f"{100 * (seconds / first.time.total - 1):+.1f} %"


def mixtures() -> str:
    """Mixtures of experts on 64 H100."""
    rows = []
    for name, recipe in MIXTURES.items():
        candidates, machine = plan("64xH100", (), recipe)
        rows.append(row_of_plan(name, candidates[0], machine))
    return markdown(["64 x H100, 128 pairs", "layout", *COLUMNS], rows)


def one_gpu() -> str:
    """The 8 B model on one GPU with the optimizer on the host, by what is recomputed."""
    candidates, machine = plan("1xA100", ("optim.cpu_offload=true",))
    first = {each.layout.config.model.activations_checkpoint_granularity: each for each in reversed(candidates)}
    rows = [row_of_plan(f"`{kind}`" if kind else "nothing", each, machine) for kind, each in first.items()]
    rows.sort(key=lambda row: float(row[4]))
    return markdown(["8 B on one A100, recomputed:", "layout", *COLUMNS], rows)


def cards() -> str:
    """The 70 B model on 64 GPUs of each card."""
    rows = []
    for card in CARDS_OF_70B:
        gpus = f"16x4x{card}" if card.startswith("GB") else f"64x{card}"
        candidates, machine = plan(gpus, SETUPS["70b"].overrides)
        rows.append(row_of_plan(machine.card.name, candidates[0], machine))
    return markdown(["70 B on 64 GPUs, 512 pairs", "layout", *COLUMNS], rows)


def tables() -> Iterator[tuple[str, str, str]]:
    """All of them, after the page and the name that it has them under."""
    page = "performance.md"
    yield page, "layouts of 8 B", layouts_of_8b()
    yield page, "forward passes", forward_passes()
    for name, setup in SETUPS.items():
        yield page, f"networks {name}", networks(setup)
    for name, setup in SETUPS.items():
        yield page, f"flags {name}", flags(setup)
    yield page, "cards", cards()
    yield "flags.md", "worth", worth()
    yield "flags.md", "one GPU", one_gpu()
    of_mixtures = mixtures()
    for page in ("mixtures.md", "performance.md"):
        yield page, "mixtures", of_mixtures


def place(page: str, name: str, content: str) -> str:
    """The page's text with a table in its place.

    Raises:
        ValueError: the page has no such place.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)}: .*? -->\n)(?:\|.*\n)*", re.MULTILINE)
    if not pattern.search(page):
        raise ValueError(f"the page has no place for the table {name!r}")
    return pattern.sub(lambda found: found[1] + content + "\n", page)


def main() -> int:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into the pages of docs/")
    wanted = parser.parse_args()
    pages: dict[str, str] = {}
    for page, name, content in tables():
        pages[page] = place(pages.get(page) or (DOCS / page).read_text(), name, content)
        if not wanted.write:
            print(f"{page}: {name}\n\n{content}\n")
    if wanted.write:
        for page, text in pages.items():
            (DOCS / page).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
