"""Buffers of collectives inside of products: their size and lifetime, asked for as Transformer Engine takes it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.model.comm_overlap import communication_buffers


class Group:
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    base = SimpleNamespace(
        tex=SimpleNamespace(device_supports_multicast=lambda: False),
        UserBufferQuantizationMode=SimpleNamespace(FP8="fp8", NONE="none"),
        initialize_ub=lambda **named: calls.append(named),
        destroy_ub=lambda: calls.append("destroyed"),
    )
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", SimpleNamespace(base=base))
    monkeypatch.delenv("UB_SKIPMC", raising=False)
    return calls


@pytest.mark.parametrize(("fp8", "mode"), [(None, "none"), ("tensorwise", "fp8")])
def test_buffers_hold_a_row_and_go_with_the_block(asked: list[Any], fp8: Any, mode: str) -> None:
    groups: Any = SimpleNamespace(context=Group(2), tensor=Group(4))
    model = ModelConfig(tp_comm_overlap=True, fp8=fp8)

    def fail_inside() -> None:
        with communication_buffers(model, groups, row_tokens=8192, hidden_size=4096):
            assert asked == [
                {"shape": [4096, 4096], "tp_size": 4, "quantization_modes": [mode], "bootstrap_backend": "nccl"}
            ]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert asked[1:] == ["destroyed"]


def test_without_the_setting_nothing_is_asked(asked: list[Any]) -> None:
    groups: Any = SimpleNamespace(context=Group(1), tensor=Group(4))
    with communication_buffers(ModelConfig(), groups, row_tokens=8192, hidden_size=4096):
        pass
    assert asked == []
