"""What a process sets once for a GPU, as far as a CPU can tell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rlcm_fast import parallel
from rlcm_fast.backbones import backends
from rlcm_fast.config import EngineConfig

SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "attention_head_dim": 8,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": [5, 10, 20],
    "num_attention_heads": None,
}


@pytest.fixture
def priority() -> Iterator[None]:
    before = torch._C._get_sdp_priority_order()
    yield
    torch._C._set_sdp_priority_order(before)


def test_the_shapes_of_attention_are_those_of_the_levels_that_have_it():
    assert backends.attention_shapes(SD15, (8, 4, 64, 64)) == [(8, 8, 4096, 40), (8, 8, 1024, 80), (8, 8, 256, 160)]
    assert backends.attention_shapes(SDXL, (2, 4, 128, 96)) == [(2, 10, 3072, 64), (2, 20, 768, 64)]


def test_the_fastest_kind_that_can_run_is_tried_first(priority: None):
    assert backends.prefer({"flash": 2.0, "cudnn": 1.0, "efficient": None}) == "cudnn"
    assert backends.prefer({"flash": None, "cudnn": None}) == "sdpa"
    backends.use_attention("cudnn")
    order = torch._C._get_sdp_priority_order()
    assert order[0] == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    assert len(set(order)) == len(order) >= 4
    q = torch.randn(1, 2, 5, 8)
    assert scaled_dot_product_attention(q, q, q).shape == q.shape  # others follow where the first cannot run


def test_a_cpu_has_no_choice_and_says_nothing():
    like, before = torch.empty(8, 4, 64, 64), torch.backends.cudnn.benchmark
    assert backends.set_backends(EngineConfig(), SD15, like) == ("sdpa", "")
    assert torch.backends.cudnn.benchmark == before
    for kind in ("flash", "xformers"):
        with pytest.raises(ValueError, match=f"attention={kind} needs a CUDA device, and this is a cpu; set engine.at"):
            backends.check_attention(EngineConfig(attention=kind), torch.device("cpu"))  # type: ignore[arg-type]
        backends.check_attention(EngineConfig(attention=kind), torch.device("cuda"))  # type: ignore[arg-type]
    backends.check_attention(EngineConfig(), torch.device("cpu"))


TIMES = {"flash": 2.0, "cudnn": 1.0, "efficient": 3.0, "xformers": 0.5}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that are measured, in order; cuDNN fails where a shape has a head of 512."""
    asked: list[str] = []

    def seconds(kind: str, shapes: Any, like: Any) -> float | None:
        asked.append(kind)
        return None if kind == "cudnn" and any(shape[3] == 512 for shape in shapes) else TIMES[kind]

    monkeypatch.setattr(backends, "_seconds", seconds)
    return asked


def choose(engine: EngineConfig, is_kept: bool = False, head: int = 40) -> tuple[str, str]:
    return backends.choose_attention(engine, [(8, 8, 64, head)], torch.empty(0), is_kept)


def test_auto_takes_the_fastest_and_xformers_only_where_nothing_is_compiled(measured: list[str]):
    assert choose(EngineConfig(compile="whole")) == ("cudnn", "")
    assert choose(EngineConfig(compile="regional"), head=512) == ("flash", "")
    assert "xformers" not in measured
    assert choose(EngineConfig(compile="off")) == ("xformers", "")


def test_a_deterministic_run_measures_nothing(measured: list[str]):
    assert choose(EngineConfig(compile="off", deterministic=True)) == ("sdpa", "")
    assert choose(EngineConfig(attention="sdpa")) == ("sdpa", "")
    assert measured == []


def test_a_resumed_run_keeps_its_kind_and_says_if_it_cannot(measured: list[str]):
    assert choose(EngineConfig(attention="efficient", compile="whole"), is_kept=True) == ("efficient", "")
    assert measured == ["efficient"]
    kind, line = choose(EngineConfig(attention="cudnn", compile="whole"), is_kept=True, head=512)
    assert kind == "flash"
    assert line == "engine.attention=cudnn, with which the run began, cannot run here: going on with flash; "


def test_a_kernel_that_is_named_and_cannot_run_is_refused(measured: list[str]):
    assert choose(EngineConfig(attention="cudnn")) == ("cudnn", "")
    with pytest.raises(
        ValueError, match="engine.attention=cudnn cannot run on this GPU with this model; set engine.at"
    ):
        choose(EngineConfig(attention="cudnn"), head=512)


def test_the_slowest_process_decides_and_all_must_be_able_to(measured: list[str], monkeypatch: pytest.MonkeyPatch):
    other = {"flash": 0.5, "cudnn": 4.0, "efficient": None}
    monkeypatch.setattr(parallel, "all_gather_list", lambda items: [*items, other])
    found = backends.slowest(["flash", "cudnn", "efficient"], [(8, 8, 64, 40)], torch.empty(0))
    assert found == {"flash": 2.0, "cudnn": 4.0, "efficient": None}


def test_xformers_is_given_what_diffusers_gives_it(monkeypatch: pytest.MonkeyPatch):
    """Rows and heads together, as its processor in diffusers does; checked with torch's arithmetic in its place."""
    module = ModuleType("xformers.ops")
    vars(module)["memory_efficient_attention"] = scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    q, k, v = (torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    found, expected = backends._xformers(q, k, v), backends._torchs(q, k, v)
    torch.testing.assert_close(found.unflatten(0, (2, 3)), expected)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert backends._seconds("xformers", [(2, 3, 5, 8)], q) is not None
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert backends._seconds("xformers", [(2, 3, 5, 8)], q) is None  # it cannot be imported


def test_the_shortest_of_some_runs_counts():
    calls: list[str] = []
    assert 0 <= backends.timed(lambda: calls.append("run"), lambda: calls.append("wait")) < 1
    assert calls == ["wait", "run", "wait"] * 5
