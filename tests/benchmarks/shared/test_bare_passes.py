"""The network that bare passes run is that of the trainer, whatever the config has made of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shared import tiny_pipelines
from benchmarks.shared.bare_passes import _copy
from rlcm_fast.backbones.acceleration import accelerate
from rlcm_fast.config import Config, EngineConfig


@pytest.mark.parametrize(
    "engine",
    [EngineConfig(), EngineConfig(group_norm="fused"), EngineConfig(channels_last=True, zero_stage=1)],
    ids=["plain", "fused norms", "channels_last under ZeRO"],
)
def test_a_copy_of_an_accelerated_network_computes_the_same_with_weights_of_its_own(engine: EngineConfig):
    unet = tiny_pipelines.unet(time_cond_proj_dim=16).eval()
    accelerate(unet, engine)
    copied = _copy(unet, Config(engine=engine))
    x, step, texts = torch.randn(2, 4, 8, 8), torch.tensor([9, 500]), torch.randn(2, 5, tiny_pipelines.WIDTH)
    guidance = torch.randn(2, 16)
    outputs = [network(x, step, texts, timestep_cond=guidance).sample for network in (unet, copied)]
    assert torch.equal(*outputs)
    assert not {id(weight) for weight in unet.parameters()} & {id(weight) for weight in copied.parameters()}
