"""What each process runs in tests/test_resize.py: engines and runs that stop, or go on from a checkpoint of others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import tiny_runs
import torch
from old_checkpoints import save_old
from tiny_policies import engine_of
from torch import Tensor, nn

from rlcm_fast import parallel
from rlcm_fast.config import parse_config
from rlcm_fast.engine import zero
from rlcm_fast.engine.base import Engine
from rlcm_fast.engine.processes import init_processes
from rlcm_fast.trainer import Trainer

_KINDS = ("fp32", "exp_avg", "exp_avg_sq")


class Odd(nn.Module):
    """No weight's size divides by 2 or 4, and one is large enough for ZeRO-3 to keep it cut (1e5 elements).

    With `frozen` that one is not trained and the same from any seed, as a start model's weights are under adapters.
    """

    def __init__(self, seed: int, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.third = nn.Linear(7, 331), nn.Linear(331, 307), nn.Linear(307, 5)
        if frozen:
            torch.manual_seed(5)
            self.second.reset_parameters()
            self.second.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).tanh())


def train_engines(folder: Path, engines: Mapping[str, Mapping[str, Any]]) -> int:
    """Two updates of each engine, saved in folder/<name>; its states in <name>.pt, those of a third in _after.pt."""
    init_processes()
    for name, settings in engines.items():
        engine = _engine(0, settings)
        _update(engine, 2)
        (folder / name).mkdir(exist_ok=True)
        parallel.barrier()
        save_old(engine, folder / name) if settings.get("old") else engine.save(folder / name)
        _leave(folder / f"{name}.pt", full_states(engine))
        _update(engine, 1)
        _leave(folder / f"{name}_after.pt", full_states(engine))
    return 0


def load_engines(folder: Path, engines: Mapping[str, Mapping[str, Any]]) -> int:
    """Each goes on from folder/<name> for an update; leaves folder/<name>_on_<processes>.pt."""
    init_processes()
    for name, settings in engines.items():
        engine = _engine(9, settings)
        engine.load(folder / name, trusts_old=settings.get("old", False))
        loaded = full_states(engine)
        _update(engine, 1)
        states = {"loaded": loaded, "after": full_states(engine)}
        _leave(folder / f"{name}_on_{parallel.world_size()}.pt", states)
    return 0


def train_and_load_engines(folder: Path, train: Mapping[str, Any], load: Mapping[str, Any]) -> int:
    """Both, in processes that were started once."""
    return train_engines(folder, train) or load_engines(folder, load)


def run_to(num_iterations: int, model: str, folder: Path, runs: Mapping[str, Mapping[str, Any]]) -> int:
    """Runs each into folder/<name>, stops as if interrupted, and leaves its states in folder/<name>.pt."""
    for name, settings in runs.items():
        trainer = Trainer(parse_config(tiny_runs.arguments(model, folder / name, settings)))
        seen: dict[str, Any] = {
            "loaded": full_states(trainer.engine.engine),
            "advantages": trainer.tasks.advantages.state_dict(),
        }
        prompts: list[str] = []
        _note_prompts(trainer, prompts)
        trainer.config = replace(trainer.config, num_iterations=num_iterations)
        trainer.run()
        seen |= {"after": full_states(trainer.engine.engine), "advantages_after": trainer.tasks.advantages.state_dict()}
        _leave(folder / f"{name}.pt", {**seen, "prompts": parallel.all_gather_list(prompts)})
    return 0


def full_states(engine: Any) -> dict[str, Any]:
    """Everything that an update depends on, by the weight's name and whole, through what DeepSpeed has for that."""
    states = {"weights": engine.full_weights(), "lr": engine.lr}
    if not isinstance(engine, zero.ZeroEngine):
        return states | {"updates": engine._num_updates, "moments": copy.deepcopy(engine._optimizer.state_dict())}
    inner = engine._engine
    states |= {"updates": inner.global_steps, "schedule": inner.lr_scheduler.state_dict()["last_epoch"]}
    moments = inner.optimizer.state if engine.zero_stage == 0 else inner.optimizer.optimizer.state
    if not all("exp_avg" in state for state in moments.values()) or not moments:  # of 8 bits, or before the first step
        return states
    if engine.zero_stage in (1, 2):
        inner.optimizer._lazy_init_hp_params_optimizer_state()  # else the accessors know the moments from a step on
    states["steps"] = sorted({float(state["step"]) for state in moments.values()})
    weights = [(name, weight) for name, weight in inner.module.named_parameters() if weight.requires_grad]
    return states | {f"{kind}/{name}": _full(inner, weight, kind) for name, weight in weights for kind in _KINDS}


def _full(inner: Any, weight: Any, kind: str) -> Tensor:
    if inner.zero_optimization_stage() == 0:
        return (weight.detach() if kind == "fp32" else inner.optimizer.state[weight][kind]).clone()
    if kind == "fp32":
        full = deepspeed.utils.safe_get_full_fp32_param(weight)
    else:
        full = deepspeed.utils.safe_get_full_optimizer_state(weight, kind)
    assert full is not None
    return full.clone()


def _engine(seed: int, settings: Mapping[str, Any]) -> Engine:
    """settings: of `engine_of`, frozen, old (saved in format 1), and group_size: weights of a group under ZeRO-3."""
    settings = {"num_updates": 5, "warmup_updates": 1, "final_lr_fraction": 0.1, "weight_decay": 0.01, **settings}
    group_size, _ = settings.pop("group_size", None), settings.pop("old", False)
    dtype = torch.float32 if settings.get("dtype", "fp32") == "fp32" else torch.bfloat16
    network = Odd(seed, settings.pop("frozen", False)).to(dtype)
    config_of = zero._deepspeed_config

    def with_groups(*arguments: Any) -> dict[str, Any]:
        config = config_of(*arguments)
        config["zero_optimization"] |= {"sub_group_size": group_size} if group_size else {}
        return config

    with patch.object(zero, "_deepspeed_config", with_groups):
        return engine_of(network, 1, **settings)


def _update(engine: Engine, num_updates: int) -> None:
    for _ in range(num_updates):
        x = torch.randn(2, 7, generator=parallel.generator(1, parallel.rank()))
        engine.backward((engine(x.to(_dtype_of(engine))).float() - 1).square().mean())
        engine.step()


def _dtype_of(engine: Any) -> torch.dtype:
    module = engine._engine.module if isinstance(engine, zero.ZeroEngine) else engine._network
    return next(module.parameters()).dtype


def _leave(file: Path, states: Any) -> None:
    if parallel.is_main():
        torch.save(states, file)


def _note_prompts(trainer: Trainer, prompts: list[str]) -> None:
    rollout = trainer.collector.rollout

    def noted(batch: Any, *more: Any) -> Any:
        prompts.extend(prompt.text for prompt in batch)
        return rollout(batch, *more)

    trainer.collector.rollout = noted  # type: ignore[method-assign]
