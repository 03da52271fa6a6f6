"""CUDA graphs of sampling and of updates give what eager passes give; needs what a run needs, and a GPU."""

# B samples, K actions: 8 x 2 transitions

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

for package in ("diffusers", "deepspeed", "peft"):  # the kernels' tests beside this file need none of them
    pytest.importorskip(package)

from tiny_policies import SCHEDULER  # noqa: E402

from benchmarks.shared import tiny_pipelines  # noqa: E402
from rlcm_fast.algorithms import PPO  # noqa: E402
from rlcm_fast.config import EngineConfig, OptimizerConfig, UpdateConfig  # noqa: E402
from rlcm_fast.engine import direct  # noqa: E402
from rlcm_fast.engine.base import UpdatePlan  # noqa: E402
from rlcm_fast.engine.direct import DirectEngine  # noqa: E402
from rlcm_fast.graphs import CudaRecorder, Graphs, Work  # noqa: E402
from rlcm_fast.parallel import Turn  # noqa: E402
from rlcm_fast.policies import Network  # noqa: E402
from rlcm_fast.policies.consistency import ConsistencyPolicy  # noqa: E402
from rlcm_fast.policies.schedules import consistency_schedule  # noqa: E402
from rlcm_fast.stages.graphed_update import GraphedUpdate  # noqa: E402
from rlcm_fast.stages.update import Updater  # noqa: E402
from rlcm_fast.trajectory import Conditioning, MixedTrajectory  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class Setting:
    """A tiny UNet in bfloat16 under the engine without DeepSpeed."""

    def __init__(self, unet: torch.nn.Module, is_graphed: bool) -> None:
        device, self.said = torch.device("cuda"), list[str]()
        self.graphs = Graphs(CudaRecorder(), self.said.append, must_work=True)
        self.unet = copy.deepcopy(unet).to(device, torch.bfloat16)
        settings = EngineConfig(dtype="pure_bf16")
        optimizer = OptimizerConfig(name="adamw_8bit", lr=1e-3)
        self.engine = DirectEngine(self.unet, settings, optimizer, UpdatePlan(3, 10, 1.0), 0)
        network = Network(self.engine, unet.config, torch.bfloat16, device)  # type: ignore[arg-type]
        self.policy = ConsistencyPolicy(network, consistency_schedule(SCHEDULER, 3), 4.0)
        algorithm, config = PPO(clip_range=1e-2), UpdateConfig(clip_range=1e-2, micro_batch_size=6)
        graphed = None
        if is_graphed:
            gradients = self.engine.hold_gradients()
            graphed = GraphedUpdate(self.graphs, self.policy, algorithm, self.engine, config, gradients)
        self.updater = Updater(self.policy, algorithm, self.engine, config, graphed=graphed)

    def conditioning(self, num_samples: int) -> Conditioning:
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(3, 5, tiny_pipelines.WIDTH, generator=generator)
        return Conditioning(table.cuda(), (torch.arange(num_samples) % 3).cuda())


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    return tiny_pipelines.unet(time_cond_proj_dim=16).eval()


def test_sampling_by_a_graph_is_sampling_without(unet: torch.nn.Module):
    setting = Setting(unet, is_graphed=False)
    conditioning = setting.conditioning(4)

    def by_graph(x_t, noise, conditioning):
        work = Work("sampling", setting.policy.denoise, fixed=setting.unet.parameters)
        return setting.graphs(work, x_t, noise, conditioning.by_sample())

    for seed in (0, 1, 2):
        with_graph, without = (
            setting.policy.sample(conditioning, torch.Generator().manual_seed(seed), denoise=denoise)
            for denoise in (by_graph, None)
        )
        torch.testing.assert_close(with_graph[1], without[1], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(with_graph[0].log_probs, without[0].log_probs, rtol=1e-3, atol=1e-3)
    assert [line.partition(" in ")[0] for line in setting.said] == ["graphs: recorded the sampling"]


@pytest.mark.parametrize("most_to_nearest", [64, 1])
def test_updates_by_a_graph_are_updates_without(
    unet: torch.nn.Module, most_to_nearest: int, monkeypatch: pytest.MonkeyPatch
):
    """Three micro-batches; sums of more than `most_to_nearest` are rounded stochastically."""
    monkeypatch.setattr(direct, "MOST_TO_NEAREST", most_to_nearest)
    settings = [Setting(unet, is_graphed) for is_graphed in (True, False)]
    advantages = torch.linspace(-2, 2, 8)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        trajectory, _ = settings[1].policy.sample(settings[1].conditioning(8), generator)
        one, other = (setting.updater.update(trajectory, advantages, Turn(0, seed=seed)) for setting in settings)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)
        assert one.ratio_mean == other.ratio_mean == 1
    assert [line.partition(" in ")[0] for line in settings[0].said] == ["graphs: recorded the update"]


def test_updates_on_two_image_sizes_by_graphs_are_updates_without(unet: torch.nn.Module):
    """An update holds micro-batches of both sizes, the last one of each filled up, and each size has a graph."""
    settings = [Setting(unet, is_graphed) for is_graphed in (True, False)]
    samples = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]
    advantages = torch.linspace(-2, 2, 8)
    for seed in (0, 1):
        parts = []
        for latent_size in ((8, 8), (8, 16)):
            conditioning = replace(settings[1].conditioning(4), latent_size=latent_size)
            parts.append(settings[1].policy.sample(conditioning, torch.Generator().manual_seed(seed))[0])
        trajectory = MixedTrajectory(parts, samples)
        one, other = (setting.updater.update(trajectory, advantages, Turn(0, seed=seed)) for setting in settings)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)
        assert one.ratio_mean == other.ratio_mean == 1
    assert [line.partition(" in ")[0] for line in settings[0].said] == ["graphs: recorded the update"] * 2
