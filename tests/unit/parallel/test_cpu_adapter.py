"""The adapter redirects CUDA calls while it is installed, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from nemo_lmpo.runtime.cpu_adapter import CpuAdapter, _replacements, on_cpu


def state() -> list[object]:
    return [getattr(owner, name) for owner, name, _ in _replacements()]


def test_uninstall_restores_everything() -> None:
    before = state()
    adapter = CpuAdapter()
    adapter.install()
    try:
        assert adapter.installed
        during = state()
        assert all(one is not other for one, other in zip(before, during, strict=True))
        device: object = torch.cuda.current_device()
        assert device == torch.device("cpu")
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.zeros(2).to("cuda:0").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        torch.cuda.manual_seed(3)
        drawn = torch.rand(2)
        torch.manual_seed(3)
        assert torch.rand(2).equal(drawn)
        adapter.install()  # a second time changes nothing
        assert state() == during
    finally:
        adapter.uninstall()
    assert not adapter.installed
    assert state() == before
    assert torch.zeros(2).type() == "torch.FloatTensor"
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2, device="cuda")
    adapter.uninstall()  # nothing to undo
    assert state() == before


def test_random_state_is_the_cpu_generators() -> None:
    with on_cpu():
        torch.cuda.set_rng_state(torch.Generator().manual_seed(8).get_state())
        assert torch.cuda.get_rng_state().equal(torch.Generator().manual_seed(8).get_state())


def test_on_cpu_nests() -> None:
    with on_cpu():
        with on_cpu():
            pass
        assert torch.zeros(1, device="cuda").device.type == "cpu", "the inner block took the adapter away"


def test_is_put_back_after_an_error() -> None:
    before = state()
    with pytest.raises(KeyError), on_cpu():
        raise KeyError
    assert state() == before


def test_refuses_where_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    adapter = CpuAdapter()
    with pytest.raises(RuntimeError, match="after CUDA was initialised"):
        adapter.install()
    assert not adapter.installed
    assert state() == before
