"""Decides which work of a run is replayed by graphs (graphs.py), and says so in one line.

    sampling    all steps of a policy; ZeRO 0 to 2, whose weights stay in one place
    decoding    one slice of latents; not with engine.offload_idle, which moves the VAE
    updates     one micro-batch, backward pass included; only engines that keep gradients in one place

Each image size has a graph of its own for each of these (graphs.py says how many at most). Sampling has one for each
state of the adapters, so that a network whose adapters are off never replays a graph with them.

Weights keep their addresses when a checkpoint is loaded, when the average or the start weights take their place, and in
every step; graphs.py compares addresses before each replay all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlcm_fast.algorithms import Algorithm
from rlcm_fast.config import Config, EngineConfig
from rlcm_fast.engine.base import Engine
from rlcm_fast.graphs import CudaRecorder, Graphs, Recorder
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.graphed_update import GraphedUpdate
from rlcm_fast.stages.images import TextToImage


def check_graphs(engine: EngineConfig, device: torch.device) -> None:
    """Raises ValueError if graphs are asked for on a device that has none, before weights load."""
    if engine.graphs == "on" and recorder_of(device) is None:
        raise ValueError(f"engine.graphs=on needs a CUDA device, and this is a {device.type}; set engine.graphs=auto")


def recorder_of(device: torch.device) -> Recorder | None:
    """Returns what records graphs on a device; None if nothing can."""
    return CudaRecorder() if device.type == "cuda" else None


def use_graphs(
    config: Config,
    images: TextToImage,
    engine: Engine,
    algorithm: Algorithm,
    say: Callable[[str], None] = say,
) -> GraphedUpdate | None:
    """Makes sampling and decoding run by graphs, as far as config.engine.graphs says, and returns what updates by one.

    Call it before anything is sampled or trained. None: updates run as they are.
    """
    # Find what can.
    if config.engine.graphs == "off":
        return None
    recorder = recorder_of(images.policy.device)
    if recorder is None:
        say(f"engine.graphs={config.engine.graphs}: no graphs on a {images.policy.device.type}")
        return None
    problems = {
        "sampling": "engine.zero_stage=3 gathers weights in hooks" if engine.zero_stage == 3 else "",
        "decoding": "engine.offload_idle=true moves the VAE" if images.backbone.moves_parts else "",
        "updates": engine.graph_problem,
    }
    can = [name for name, problem in problems.items() if not problem]
    cannot = "".join(f"; not {name}: {problem}" for name, problem in problems.items() if problem)
    say(f"engine.graphs={config.engine.graphs}: graphs for {', '.join(can) or 'nothing'}{cannot}")

    # Use them, all in one memory pool.
    graphs = Graphs(recorder, say, must_work=config.engine.graphs == "on")
    images.graphs = graphs if "sampling" in can else None
    if "decoding" in can:
        images.backbone.use_graphs(graphs)
    if "updates" not in can:
        return None
    return GraphedUpdate(graphs, images.policy, algorithm, engine, config.update, engine.hold_gradients())
