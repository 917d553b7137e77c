"""Times of every attention kernel of this machine on one packed row: forward and backward of a layer.

python benchmarks/attention_kernels.py [--pairs 8] [--heads 8 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.data.example import Example
from nemo_lmpo.data.pack import pack_examples
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.model.attention_plan import plan_attention
from nemo_lmpo.model.build import attention_module
from nemo_lmpo.model.kernels import choose_kernels, this_device
from nemo_lmpo.parallel.context import attention_spans
from nemo_lmpo.runtime.cpu_adapter import ADAPTER
from nemo_lmpo.sizing.typical_rows import PAIR

HEAD_DIM = 128


def main() -> None:
    """Print a row for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 2], metavar=("HEADS", "GROUPS"))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        ADAPTER.install()
    from megatron.core.transformer.transformer_config import TransformerConfig

    device = torch.device("cuda" if cuda else "cpu")
    heads, groups = options.heads
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * HEAD_DIM, num_attention_heads=heads, num_query_groups=groups,
        kv_channels=HEAD_DIM, bf16=True,
    )  # fmt: skip
    prompt, chosen, rejected = ([1] * length for length in (PAIR.prompt, *PAIR.responses))
    pairs = [Example.pair(str(number), prompt, chosen, rejected) for number in range(options.pairs)]
    row = pack_examples(pairs, range(options.pairs), share_prompt=True)
    spans = attention_spans(row.segments, row.num_tokens, cp_rank=0, cp_size=1)
    plan = plan_attention(spans, row.num_tokens, cp_size=1).map(lambda tensor: tensor.to(device))
    states = [
        torch.randn(row.num_tokens, 1, count, HEAD_DIM, device=device, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, groups, groups)
    ]
    print(
        f"{row.num_tokens} tokens, {len(spans)} spans, {heads} heads of {HEAD_DIM}, {groups} groups, "
        f"{this_device(use_cuda=cuda).name}"
    )
    print("| kernel | forward ms | forward and backward ms |\n|---|---|---|")
    for backend in ("flash", "te", "sdpa"):
        model = ModelConfig(attention_backend=backend)
        try:
            kernels = choose_kernels(model, precision="bf16", head_dim=HEAD_DIM, device=this_device(use_cuda=cuda))
        except ConfigError as error:
            print(f"| {backend} | {error} | |")
            continue
        module = attention_module(kernels)(config, 1)

        def forward(module: torch.nn.Module = module) -> torch.Tensor:
            attended: torch.Tensor = module(*states, attention_bias=plan)
            return attended

        once = milliseconds(lambda: forward(), options.rounds)
        both = milliseconds(lambda: forward().sum().backward(), options.rounds)
        print(f"| {backend} | {once:.3f} | {both:.3f} |")


def milliseconds(function: Callable[[], object], rounds: int) -> float:
    """Mean time of a call after three of warm-up, to its last kernel."""
    for _ in range(3):
        function()
    wait()
    started = time.perf_counter()
    for _ in range(rounds):
        function()
    wait()
    return 1e3 * (time.perf_counter() - started) / rounds


def wait() -> None:
    """Until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
