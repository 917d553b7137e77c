"""The plans of docs/performance.md, made again: this prints them, and with `--write` puts them there.

Everything is computed by `dry_run=plan`'s own functions, in seconds, without a GPU. A test holds the page to it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.formats.architecture import architecture_from_hf
from nemo_lmpo.runtime.files import GIB
from nemo_lmpo.sizing.cards import Machine, read_gpus
from nemo_lmpo.sizing.describe_plan import decided_by, layout_name
from nemo_lmpo.sizing.search import Candidate, model_flops, rank_layouts

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
RECIPE = "lmpo_llama3_8b"


def _architecture(hidden: int, ffn: int, layers: int, heads: int) -> tuple[str, ...]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return tuple(f"model.architecture.{name}={size}" for name, size in sizes.items())


LLAMA_70B, LLAMA_405B = _architecture(8192, 28672, 80, 64), _architecture(16384, 53248, 126, 128)
FLAGS: tuple[tuple[str, ...], ...] = (("optim.moments_dtype=bf16",),)
"""Settings that a plan is made with, one at a time, beside the recipe's own."""


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
CARDS_OF_70B = ("A100", "H800", "H100", "H200", "B200", "GB200", "B300", "GB300")


@lru_cache(maxsize=64)
def plan(gpus: str, overrides: tuple[str, ...]) -> tuple[list[Candidate], Machine]:
    """Layouts that fit, fastest first."""
    config = load_recipe(RECIPE, list(overrides))
    assert config.model.architecture is not None
    machine = read_gpus(gpus)
    return rank_layouts(config, architecture_from_hf(config.model.architecture), machine), machine


def cells(candidate: Candidate, machine: Machine) -> list[str]:
    """Row, memory, time with its range, speed, utilisation and what decides, as a table shows them."""
    mfu = model_flops(candidate) / (candidate.time.total * machine.gpus * machine.card.peak)
    return [
        str(candidate.layout.config.data.row_budget),
        f"{candidate.memory / GIB:.1f}",
        f"{candidate.time.total:.2f}",
        f"{candidate.fast:.2f} to {candidate.slow:.2f}",
        f"{candidate.pairs_per_second:.1f}",
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
        rows.append([f"`{given}`", str(passes), f"{first.time.total:.2f}", f"{first.pairs_per_second:.1f}"])
    return markdown(["", "forward passes more", "step s", "pairs/s"], rows)


def flags(setup: Setup) -> str:
    """A model's fastest layout; the first at the slow end, with or without FSDP, on other networks, with each flag."""
    rows = []

    def add(
        what: str, gpus: str, given: tuple[str, ...] = (), which: Callable[[Candidate], bool] | None = None
    ) -> None:
        candidates, machine = plan(gpus, setup.overrides + given)
        found = next((each for each in candidates if which is None or which(each)), None)
        rows.append([what, layout_name(found), *cells(found, machine)] if found else [what, "none fits", *[""] * 7])

    candidates, _ = plan(setup.gpus, setup.overrides)
    safest = min(candidates, key=lambda each: each.slow)
    add("BF16", setup.gpus)
    add("first at the slow end", setup.gpus, which=lambda each: layout_name(each) == layout_name(safest))
    is_sharded = candidates[0].layout.config.model.fsdp
    kind = "without FSDP" if is_sharded else "with FSDP"
    add(kind, setup.gpus, which=lambda each: each.layout.config.model.fsdp is not is_sharded)
    if plan(setup.gpus, setup.overrides)[1].nodes > 1:
        for rate in (200, 400, 800):
            add(f"{rate} Gbit/s a GPU", f"{setup.gpus}-{rate}g")
    for given in FLAGS:
        add(f"`{' '.join(given)}`", setup.gpus, given)
    return markdown([setup.title, "layout", *COLUMNS], rows)


def cards() -> str:
    """The 70 B model on 64 GPUs of each card."""
    rows = []
    for card in CARDS_OF_70B:
        gpus = f"16x4x{card}" if card.startswith("GB") else f"64x{card}"
        candidates, machine = plan(gpus, SETUPS["70b"].overrides)
        rows.append([machine.card.name, layout_name(candidates[0]), *cells(candidates[0], machine)])
    return markdown(["70 B on 64 GPUs, 512 pairs", "layout", *COLUMNS], rows)


def tables() -> Iterator[tuple[str, str]]:
    """All of them by the name that the page has them under."""
    yield "layouts of 8 B", layouts_of_8b()
    yield "forward passes", forward_passes()
    for name, setup in SETUPS.items():
        yield f"flags {name}", flags(setup)
    yield "cards", cards()


def place(page: str, name: str, content: str) -> str:
    """The page with a table in its place.

    Raises:
        ValueError: the page has no such place.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)}: .*? -->\n)(?:\|.*\n)*", re.MULTILINE)
    if not pattern.search(page):
        raise ValueError(f"{PAGE.name} has no place for the table {name!r}")
    return pattern.sub(lambda found: found[1] + content + "\n", page)


def main() -> int:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/performance.md")
    wanted = parser.parse_args()
    page = PAGE.read_text()
    for name, content in tables():
        page = place(page, name, content)
        if not wanted.write:
            print(f"{name}\n\n{content}\n")
    if wanted.write:
        PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
