"""Keeps drawn rounds on the disk until a checkpoint holds what was learned from them, so that a restart redraws none.

A person may have rated half of a round when a run stops. With update.rollout_lag=1, a round is also of weights that are
gone. So each round's latents, log-probs and x_0 lie in run_dir/rounds/NUMBER, 5 MB for 16 images of 512 x 512 pixels. A
round that was drawn with other settings, other prompts or another number of processes does not count.
"""

# B samples of a micro-batch, K actions, C H W latent

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import Config, to_dict
from rlcm_fast.engine.tensor_files import read_metadata, read_tensors, write_tensors
from rlcm_fast.parallel import Turn
from rlcm_fast.run_folder.checkpoint import complete
from rlcm_fast.trajectory import Conditioning, Prompt, Trajectory

_OTHERS = ("rewards", "tasks", "evaluation", "checkpoint", "tracking", "run_dir", "num_iterations", "resume", "profile")
"""Settings that change no round."""

Piece = tuple[Trajectory, Tensor]
"""The trajectories of a micro-batch, and x_0 (B, C, H, W)."""


@dataclass(frozen=True)
class KeptRound:
    """A round that an earlier start has drawn."""

    tensors: dict[str, Tensor]
    device: torch.device

    def piece(self, number: int, conditioning: Conditioning) -> Piece:
        """Returns micro-batch `number`, whose texts are encoded in `conditioning`."""
        latents, log_probs, x_0 = (
            self.tensors[f"{number}.{name}"].to(self.device) for name in ("latents", "log_probs", "x_0")
        )
        return Trajectory(latents, log_probs, conditioning), x_0


class KeptRounds:
    """The rounds of a run in its folder, each process its own."""

    def __init__(self, config: Config, device: torch.device, rounds_per_iteration: int) -> None:
        self._run_dir, self._device = Path(config.run_dir), device
        self._rounds_per_iteration = rounds_per_iteration
        settings = {name: value for name, value in to_dict(config).items() if name not in _OTHERS}
        self._settings = _digest(settings)

    def load(self, turn: Turn, prompts: Sequence[Prompt]) -> KeptRound | None:
        """Returns the round of this turn, if it is there and was drawn for these prompts with these settings."""
        file = self._file(turn)
        if not file.exists():
            return None
        try:
            is_ours = read_metadata(file).get("key") == self._key(prompts)
            return KeptRound(read_tensors(file), self._device) if is_ours else None
        except Exception:  # noqa: BLE001 (half a file: the round is drawn again)
            return None

    def save(self, turn: Turn, prompts: Sequence[Prompt], pieces: Sequence[Piece]) -> None:
        """Writes the round, and deletes those that the newest checkpoint has learned from; raises OSError."""
        tensors: dict[str, Tensor] = {}
        for number, (trajectory, x_0) in enumerate(pieces):
            of_piece = {"latents": trajectory.latents, "log_probs": trajectory.log_probs, "x_0": x_0}
            tensors |= {f"{number}.{name}": tensor.detach().cpu().contiguous() for name, tensor in of_piece.items()}
        file = self._file(turn)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}")
        write_tensors(partial, tensors, {"key": self._key(prompts)})
        os.replace(partial, file)
        self.delete_learned()

    def delete_learned(self) -> None:
        """Deletes the rounds that the newest checkpoint has learned from."""
        checkpoints = complete(self._run_dir)
        finished = int(checkpoints[-1].name.rpartition("_")[2]) if checkpoints else 0
        for file in self._run_dir.glob(f"rounds/*_{parallel.rank()}.safetensors"):
            if int(file.name.partition("_")[0]) < finished * self._rounds_per_iteration:
                file.unlink(missing_ok=True)

    def _file(self, turn: Turn) -> Path:
        number = turn.iteration * turn.num_rounds + turn.round
        return self._run_dir / "rounds" / f"{number:06d}_{parallel.rank()}.safetensors"

    def _key(self, prompts: Sequence[Prompt]) -> str:
        texts = [(prompt.text, prompt.task, prompt.metadata) for prompt in prompts]
        return _digest([self._settings, parallel.world_size(), texts])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
