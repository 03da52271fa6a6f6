"""Keeps what a run has finished: checkpoints that are due, and what can be saved when something goes wrong.

A checkpoint is written only if its weights draw images. After an error the finished iterations are saved if weights,
disk and processes allow it. The error gets a note (PEP 678) that says what was saved and how to go on.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rlcm_fast import parallel
from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.faults import Diverged, Fault
from rlcm_fast.run_folder.best import Best, is_better, value_of
from rlcm_fast.run_folder.checkpoint import checkpoint_name, complete, is_full_disk
from rlcm_fast.run_folder.failures import first_line
from rlcm_fast.run_folder.resume import RunFolder
from rlcm_fast.run_folder.stage_profile import stage


@dataclass
class Progress:
    """The finished iterations of a run and their checkpoints; every rank must call its methods."""

    folder: RunFolder
    engine: AveragingEngine
    check_weights: Callable[[int], None]  # raises Diverged if the weights after so many iterations draw no images
    best: str = ""  # checkpoint.best
    state: dict[str, Any] = field(default_factory=dict)
    """The state after the last finished iteration, which a dropped iteration goes back to."""
    _num_updates: int = 0
    _loaded: int | None = None  # the iterations of the checkpoint that the run goes on from
    _saved: int | None = None  # those of the checkpoint that it has written since

    def note(self, state: dict[str, Any]) -> None:
        """Notes the state after a finished iteration."""
        self.state, self._num_updates = state, self.engine.num_updates

    def load(self) -> dict[str, Any] | None:
        """Restores the engine and returns the rest of the state for `load_state_dict`; None if the run is new."""
        state = self.folder.load(self.engine)
        self._loaded = state["iteration"] if state else None
        return state

    def save(self) -> None:
        """Writes a checkpoint of the finished iterations; raises Diverged if their weights draw no images any more.

        A checkpoint that this run has just written is not written again.
        """
        iteration = self.state["iteration"]
        if iteration == self._saved:
            return
        with stage("checkpoint"):
            self.check_weights(iteration)
            self.folder.save(iteration, self.engine, self.state)
        self._saved = iteration

    def keep_best(self, evaluated: dict[str, float]) -> dict[str, float]:
        """Keeps the weights of the finished iterations if checkpoint.best says that they are the best so far.

        evaluated: the metrics of their evaluation, which it returns; the same on every rank, and every rank must call.
        """
        iteration, metric = self.state["iteration"], self.best
        value = value_of(metric, evaluated) if metric else None
        if value is None or iteration == 0:
            return evaluated
        run_dir = self.folder.run_dir
        if parallel.any_rank(parallel.is_main() and is_better(metric, value, Best.find(run_dir), iteration)):
            name = checkpoint_name(iteration)
            if self.folder.checkpoint != run_dir / "checkpoints" / name:  # also if it is another run's
                self.save()
            if parallel.is_main():
                Best(name, iteration, metric, value).write(run_dir)
        return evaluated

    def save_at_stop(self) -> None:
        """Saves as `save` does; an error gets a note that says how to go on."""
        try:
            self.save()
        except Exception as error:
            self.rescue(error)
            raise

    def rescue(self, error: Exception) -> None:
        """Saves the iterations that were finished before `error`, if that is possible, and notes on it how to go on."""
        error.add_note(self._rescued(error))

    def _rescued(self, error: Exception) -> str:
        # Name the checkpoint that is there, if nothing newer can be saved; a run that went back has newer ones.
        iteration, last = self.state["iteration"], self.folder.checkpoint
        how = "latest" if complete(self.folder.run_dir)[-1:] == [last] else last
        there = f"go on from {last} with --resume {how}" if last else "the run has no checkpoint yet"
        if isinstance(error, Diverged):
            return f"the last good checkpoint is {last}: --resume {how} goes on from it" if last else there
        if iteration in (self._saved, self._loaded):
            return f"all {iteration} finished iterations are saved: {there}"
        if iteration == 0 or not self._can_save(error):
            return there

        # Save without the memory that the broken iteration holds.
        free_memory(error)
        try:
            self.save()
        except Exception as second:  # noqa: BLE001 (the first error must be shown, whatever the second is)
            return f"saving the finished iterations failed, too ({first_line(second)}); {there}"
        num_extra = self.engine.num_updates - self._num_updates
        extra = f", with {num_extra} updates of the next one in their weights" if num_extra else ""
        return f"the {iteration} finished iterations are saved{extra}: go on with --resume latest"

    def _can_save(self, error: Exception) -> bool:
        """Tells whether all that a checkpoint needs is here: every process, or this one if it holds the whole state."""
        if is_full_disk(error):
            return False
        if parallel.world_size() == 1 or (isinstance(error, Fault) and error.is_on_all_processes):
            return True
        if self.engine.zero_stage > 0 or not parallel.is_main():
            return False
        parallel.leave()  # the others are lost, or wait for this process
        return True


def free_memory(error: BaseException | None) -> None:
    """Drops the tensors that the frames of the error hold: after "out of memory", saving needs room."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
