"""Sampling by graphs draws what the network draws as it is now: with its adapters or without, of any weights."""

# B samples

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded_work import CpuRecorder
from tiny_policies import TinyNetwork, encode, policy_of, prompts
from torch import Tensor

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import EmaConfig, LoraConfig, ModelConfig, PolicyConfig
from rlcm_fast.engine.averaging import WeightAverage
from rlcm_fast.graphs import Graphs
from rlcm_fast.policies import Network, build_policy
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.trajectory import Prompt


def drawn(images: TextToImage, conditioning: Any) -> tuple[Tensor, Tensor]:
    """The images' latents by a graph and as they are."""
    graphs, found = images.graphs, list[Tensor]()
    for images.graphs in (graphs, None):
        found.append(images.sample(conditioning, torch.Generator().manual_seed(1))[1])
    images.graphs = graphs
    return found[0], found[1]


def test_a_network_without_its_adapters_replays_no_graph_with_them(tiny_lcm_folder: str):
    cpu = torch.device("cpu")
    backbone = Backbone.load(ModelConfig(tiny_lcm_folder), cpu, torch.float32, "consistency")
    backbone.add_adapters(LoraConfig(rank=2, targets=["to_q"]))
    for name, weight in backbone.unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    config: Any = backbone.unet.config
    network = Network(backbone.unet, config, torch.float32, cpu)
    recorder, said = CpuRecorder(), list[str]()
    policy = build_policy(PolicyConfig(num_steps=2), network, backbone.scheduler_config)
    images = TextToImage(policy, backbone, Graphs(recorder, said.append, must_work=True))
    conditioning = images.encode([Prompt("a star")])

    found = []
    for are_on in (True, False, True, False):
        (backbone.unet.enable_adapters if are_on else backbone.unet.disable_adapters)()
        assert backbone.adapters_are_on == are_on
        by_graph, plain = drawn(images, conditioning)
        assert torch.equal(by_graph, plain)
        found.append(by_graph)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert recorder.num_recorded == 2 and recorder.num_forgotten == 0


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_averaged_weights_take_the_place_of_the_trained_ones_in_the_same_graph(device: Any):
    network, recorder = TinyNetwork(), CpuRecorder()
    average = WeightAverage(network, EmaConfig(decay=0.5, device=device))
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1
    backbone: Any = SimpleNamespace(unet=network, adapters_are_on=True)
    images = TextToImage(policy_of(network), backbone, Graphs(recorder, lambda line: None, must_work=True))
    conditioning, found = encode(prompts(2)), list[Tensor]()
    for _ in range(2):
        with average.applied():
            found += drawn(images, conditioning)
        found += drawn(images, conditioning)
    averaged, trained = found[0], found[2]
    assert not torch.equal(averaged, trained)
    for by_graph, plain in (found[0:2], found[4:6]):
        assert torch.equal(by_graph, averaged) and torch.equal(plain, averaged)
    for by_graph, plain in (found[2:4], found[6:8]):
        assert torch.equal(by_graph, trained) and torch.equal(plain, trained)
    assert recorder.num_recorded == 1 and recorder.num_forgotten == 0
