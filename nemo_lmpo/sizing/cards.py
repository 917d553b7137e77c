"""What GPUs and their networks can do: figures of data sheets, and the share of them that programs get.

The shares are assumptions. One a card was fitted (:attr:`Card.products`), on published MPT-7B runs
(docs/performance.md); the others are round numbers that microbenchmarks of the field agree with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from nemo_lmpo.errors import ConfigError

# Dense FLOP/s of one device in BF16 and FP8 by the vendor's data sheets (0: it has none; V100: FP16 for BF16), and its
# compute capability; first match wins. Names are those of torch.cuda.get_device_name, as "NVIDIA A100-SXM4-80GB".
_DEVICES: tuple[tuple[str, float, float, int], ...] = (
    (r"\bMIG\b", 0.0, 0.0, 0),  # a slice of a GPU, whose share the name does not tell
    (r"\bGB300\b", 2.5e15, 5.0e15, 103),
    (r"\bB300\b", 2.25e15, 4.5e15, 103),
    (r"\bGB200\b", 2.5e15, 5.0e15, 100),
    (r"\bB200\b", 2.25e15, 4.5e15, 100),
    (r"\bRTX PRO 6000\b.*\bMax-Q\b", 438.9e12, 877.8e12, 120),
    (r"\bRTX PRO 6000\b", 503.8e12, 1007.6e12, 120),
    (r"\bH[18]00 PCIe\b", 756e12, 1513e12, 90),
    (r"\b(H[128]00) NVL\b", 835e12, 1671e12, 90),
    (r"\bG?H200\b|\bH100\b|\bH800\b", 989e12, 1979e12, 90),
    (r"\bH20\b", 148e12, 296e12, 90),
    (r"\bA100\b|\bA800\b", 312e12, 0.0, 80),
    (r"\bA40\b", 149.7e12, 0.0, 86),
    (r"\bA30\b", 165e12, 0.0, 80),
    (r"\bA10\b", 125e12, 0.0, 86),
    (r"\bL40S\b", 362e12, 733e12, 89),
    (r"\bL40\b", 181e12, 362e12, 89),
    (r"\bL4\b", 121e12, 242e12, 89),
    (r"\bRTX A6000\b", 154.8e12, 0.0, 86),
    (r"\bV100\b", 125e12, 0.0, 70),
)
BLACKWELL = 100
"""Compute capability from which on kernels need no single queue to run in order (CUDA_DEVICE_MAX_CONNECTIONS=1)."""


def _device(device_name: str | None) -> tuple[float, float, int]:
    for pattern, *figures in _DEVICES:
        if device_name is not None and re.search(pattern, device_name):
            return figures[0], figures[1], int(figures[2])
    return 0.0, 0.0, 0


def peak_flops(device_name: str | None) -> float | None:
    """Dense BF16 FLOP/s of one device by its CUDA name; None when unknown, or for the CPU (no name)."""
    return _device(device_name)[0] or None


def peak_fp8_flops(device_name: str | None) -> float | None:
    """The same in FP8; None where it has none, too."""
    return _device(device_name)[1] or None


def compute_capability(device_name: str | None) -> int | None:
    """For example 80 of an A100, 90 of an H100, 100 of a B200; None when unknown."""
    return _device(device_name)[2] or None


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
    domain: int = 0
    """GPUs that NVLink joins; 0: those of a node."""

    moved: float = 0.8
    """Share of the memory's bandwidth that other kernels get."""
    collectives: float = 0.75
    """Share of a link's rate that a collective gets."""
    launch: float = 6e-6
    """Seconds the host needs for a kernel, Python and autograd included."""
    latency: float = 20e-6
    """Seconds a collective takes however short it is."""

    @property
    def peak_fp8(self) -> float:
        """Dense FP8 FLOP/s; 0 where it has none."""
        return peak_fp8_flops(self.name) or 0.0

    @property
    def before_blackwell(self) -> bool:
        """Whether communication overlaps in order only with CUDA_DEVICE_MAX_CONNECTIONS=1."""
        return (compute_capability(self.name) or 0) < BLACKWELL

    @property
    def joined(self) -> int:
        """GPUs that NVLink joins, or PCIe."""
        return self.domain or self.node


def _peak(name: str) -> float:
    found = peak_flops(name)
    assert found is not None, name
    return found


def _card(
    name: str, memory: float, bandwidth: float, processors: int, link: float, network: float, **more: Any
) -> Card:
    """Memory in 10^9 bytes, bandwidth in 10^12 bytes/s, link and network in 10^9 bytes/s.

    The shares of a Hopper GPU are taken for those that came later, of which no run is published that would tell.
    """
    shares = {"products": 0.55, "attention": 0.40} | more
    return Card(name, memory * 1e9, _peak(name), bandwidth * 1e12, processors, link * 1e9, network * 1e9, **shares)


PCIE, PCIE5 = 32e9, 64e9
"""Bytes/s of PCIe 4.0 and 5.0 x 16; the first takes NVLink's place with the suffix `-pcie`."""
CARDS = {
    "a100": _card("A100 80 GB SXM", 80, 2.039, 108, 300, 25, products=0.735, attention=0.50),
    "h100": _card("H100 80 GB SXM", 80, 3.35, 132, 450, 50),
    "h100-nvl": _card("H100 NVL", 94, 3.9, 132, 300, 50, domain=2),
    "h100-pcie": _card("H100 PCIe", 80, 2.0, 114, PCIE5 / 1e9, 50),
    "h200": _card("H200 141 GB SXM", 141, 4.8, 132, 450, 50),
    "h200-nvl": _card("H200 NVL", 141, 4.8, 132, 450, 50, domain=4),
    "h800": _card("H800 SXM", 80, 3.35, 132, 200, 50),
    "h800-pcie": _card("H800 PCIe", 80, 2.0, 114, PCIE5 / 1e9, 50),
    "b200": _card("B200 180 GB SXM", 180, 8.0, 148, 900, 50),
    "gb200": _card("GB200 NVL72", 186, 8.0, 152, 900, 50, node=4, domain=72),
    "b300": _card("B300 288 GB SXM", 288, 8.0, 148, 900, 100),
    "gb300": _card("GB300 NVL72", 288, 8.0, 152, 900, 100, node=4, domain=72),
    "rtx-pro-6000": _card("RTX PRO 6000 Blackwell", 96, 1.6, 188, PCIE5 / 1e9, 50),
}
ETHERNET = 3.1e9
"""Bytes/s a GPU of 25 Gbit/s a GPU, which takes InfiniBand's place with the suffix `-ethernet`."""
GIGABIT = 1e9 / 8
"""Bytes of a gigabit."""

_GPUS = re.compile(r"(?:(\d+)x)??(\d+)(?:x([a-z][\w/-]*))?")
_NETWORK = re.compile(r"(\d+)g(/node)?")


@dataclass(frozen=True)
class Machine:
    """Nodes of one kind of card."""

    card: Card
    nodes: int
    network_is_known: bool = False
    """Whether the user named the network's rate, which is assumed otherwise."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.card.node


def read_gpus(text: str) -> Machine:
    """Read `4`, `64xH100`, `16x4xA100` (nodes x GPUs x card), and what stands behind the card.

    `-pcie` is the card for PCIe, or this card without NVLink; `-nvl` one with bridges. The network to other nodes is
    `-200g` (Gbit/s a GPU), `-1600g/node` (Gbit/s a node) or `-ethernet`. A number alone is of A100s. Up to a node's
    GPUs are one node; more are whole nodes.

    Raises:
        ConfigError: it cannot be read, or the card is unknown.
    """
    found = _GPUS.fullmatch(text.lower().replace(" ", ""))
    if found is None:
        raise ConfigError(f"GPUS={text} cannot be read; write GPUS=4, GPUS=64xH100 or GPUS=16x4xA100")
    card, suffixes = _named_card(text, found[3] or "a100")
    nodes, count = found[1], int(found[2])
    if nodes is not None:
        node = count
    elif count > card.node and count % card.node:
        raise ConfigError(f"GPUS={text} is not a whole number of nodes of {card.node}; write NODESxGPUSxCARD")
    else:
        node = min(count, card.node)
    number = int(nodes) if nodes is not None else max(1, count // card.node)
    if number < 1 or node < 1:
        raise ConfigError(f"GPUS={text} means no GPU; give at least 1")
    card, known = replace(card, node=node), False
    for suffix in suffixes:
        card, is_network = _changed(text, card, suffix)
        known = known or is_network
    return Machine(card, number, known)


def _named_card(text: str, name: str) -> tuple[Card, list[str]]:
    """The card that most words of a name belong to, and the words behind."""
    words = name.split("-")
    for count in range(len(words), 0, -1):
        card = CARDS.get("-".join(words[:count]))
        if card is not None:
            return card, words[count:]
    raise ConfigError(f"GPUS={text} names the card {words[0]}, which is unknown; known: {', '.join(CARDS)}")


def _changed(text: str, card: Card, suffix: str) -> tuple[Card, bool]:
    """The card with another link or network; whether it is the network."""
    network = _NETWORK.fullmatch(suffix)
    if network is not None and int(network[1]):
        rate, of_node = int(network[1]) * GIGABIT, bool(network[2])
        return replace(card, network=rate / card.node if of_node else rate, name=f"{card.name}, {suffix}"), True
    if suffix == "ethernet":
        return replace(card, network=ETHERNET, name=f"{card.name}, Ethernet"), True
    if suffix == "pcie":
        return replace(card, link=PCIE, name=f"{card.name}, PCIe"), False
    raise ConfigError(
        f"GPUS={text} ends in -{suffix}, which is unknown; known: -pcie, -200g (Gbit/s a GPU), -1600g/node, -ethernet"
    )
