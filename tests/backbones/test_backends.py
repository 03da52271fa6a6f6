"""What a process sets once for a GPU, as far as a CPU can tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

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


def test_a_cpu_has_no_choice_and_says_so_only_if_asked():
    like, before = torch.empty(8, 4, 64, 64), torch.backends.cudnn.benchmark
    assert backends.set_backends(EngineConfig(), SD15, like) == ""
    assert backends.set_backends(EngineConfig(attention="auto"), SD15, like) == "engine.attention=auto: sdpa on a cpu"
    assert torch.backends.cudnn.benchmark == before


def test_the_shortest_of_some_runs_counts():
    calls: list[str] = []
    assert 0 <= backends.timed(lambda: calls.append("run"), lambda: calls.append("wait")) < 1
    assert calls == ["wait", "run", "wait"] * 5
