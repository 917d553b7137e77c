"""What GPUs and their networks can do: figures of data sheets, and the share of them that programs get.

The shares are assumptions. One a card was fitted (:attr:`Card.products`), on published MPT-7B runs
(docs/performance.md); the others are round numbers that microbenchmarks of the field agree with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nemo_lmpo.errors import ConfigError

# Dense BF16 FLOP/s of one device by the vendor's data sheets (V100: FP16, it has no BF16), first match wins.
# Names are those of torch.cuda.get_device_name, for example "NVIDIA A100-SXM4-80GB".
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bMIG\b", 0.0),  # a slice of a GPU, whose share the name does not tell
    (r"\bGB200\b", 2.5e15),
    (r"\bB200\b", 2.25e15),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bG?H200\b|\bH100\b|\bH800\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA100\b|\bA800\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bV100\b", 125e12),
)


def peak_flops(device_name: str | None) -> float | None:
    """Dense BF16 FLOP/s of one device by its CUDA name; None when unknown, or for the CPU (no name)."""
    for pattern, flops in PEAK_FLOPS:
        if device_name is not None and re.search(pattern, device_name):
            return flops or None
    return None


@dataclass(frozen=True)
class Card:
    """A GPU in its node."""

    name: str
    memory: float
    """Bytes."""
    peak: float
    """Dense BF16 FLOP/s."""
    bandwidth: float
    """Memory, bytes/s."""
    processors: int
    """Streaming multiprocessors, over which a matrix product's tiles are dealt."""
    link: float
    """NVLink (or PCIe), bytes/s that a GPU sends."""
    network: float
    """InfiniBand (or Ethernet), bytes/s that a GPU sends to other nodes."""
    products: float
    """Share of the peak that a large matrix product gets."""
    attention: float
    """Share of the peak that flash attention gets, forward and backward together."""
    node: int = 8
    """GPUs of a node."""

    moved: float = 0.8
    """Share of the memory's bandwidth that other kernels get."""
    collectives: float = 0.75
    """Share of a link's rate that a collective gets."""
    launch: float = 6e-6
    """Seconds the host needs for a kernel, Python and autograd included."""
    latency: float = 20e-6
    """Seconds a collective takes however short it is."""


def _peak(name: str) -> float:
    found = peak_flops(name)
    assert found is not None, name
    return found


A100, H100, H200 = "A100 80 GB SXM", "H100 80 GB SXM", "H200 141 GB SXM"
CARDS = {
    "a100": Card(A100, 80 * 1e9, _peak(A100), 2.039e12, 108, 300e9, 25e9, products=0.735, attention=0.50),
    "h100": Card(H100, 80 * 1e9, _peak(H100), 3.35e12, 132, 450e9, 50e9, products=0.55, attention=0.40),
    "h200": Card(H200, 141 * 1e9, _peak(H200), 4.8e12, 132, 450e9, 50e9, products=0.55, attention=0.40),
}
PCIE = 32e9
"""Bytes/s of PCIe 4.0 x 16, which takes NVLink's place with the suffix `-pcie`."""
ETHERNET = 3.1e9
"""Bytes/s a GPU of 25 Gbit/s a GPU, which takes InfiniBand's place with the suffix `-ethernet`."""

_GPUS = re.compile(r"(?:(\d+)x)??(\d+)(?:x([a-z]\w*)((?:-\w+)*))?")


@dataclass(frozen=True)
class Machine:
    """Nodes of one kind of card."""

    card: Card
    nodes: int

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.card.node


def read_gpus(text: str) -> Machine:
    """Read `4`, `64xH100`, `16x4xA100` (nodes x GPUs x card), with `-pcie` or `-ethernet` behind the card.

    A number alone is of A100s. Up to 8 GPUs are one node; more are nodes of 8.

    Raises:
        ConfigError: it cannot be read, or the card is unknown.
    """
    found = _GPUS.fullmatch(text.lower().replace(" ", ""))
    if found is None:
        raise ConfigError(f"GPUS={text} cannot be read; write GPUS=4, GPUS=64xH100 or GPUS=16x4xA100")
    nodes, count, name = found[1], int(found[2]), found[3] or "a100"
    suffixes = found[4].split("-")[1:] if found[4] else []
    if name not in CARDS:
        raise ConfigError(f"GPUS={text} names the card {name}, which is unknown; known: {', '.join(CARDS)}")
    card = CARDS[name]
    for suffix in suffixes:
        if suffix not in ("pcie", "ethernet"):
            raise ConfigError(f"GPUS={text} ends in -{suffix}, which is unknown; known: -pcie, -ethernet")
        card = replace(card, link=PCIE) if suffix == "pcie" else replace(card, network=ETHERNET)
        card = replace(card, name=f"{card.name}, {'PCIe' if suffix == 'pcie' else 'Ethernet'}")
    if nodes is not None:
        return _machine(text, replace(card, node=count), int(nodes))
    if count > card.node and count % card.node:
        raise ConfigError(f"GPUS={text} is not a whole number of nodes of {card.node}; write NODESxGPUSxCARD")
    return _machine(text, replace(card, node=min(count, card.node)), max(1, count // card.node))


def _machine(text: str, card: Card, nodes: int) -> Machine:
    if nodes < 1 or card.node < 1:
        raise ConfigError(f"GPUS={text} means no GPU; give at least 1")
    return Machine(card, nodes)
