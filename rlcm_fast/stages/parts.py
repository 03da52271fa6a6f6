"""The parts of a run, their state in a checkpoint, and what they do when the run stops; build.py makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlcm_fast.config import Config
from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.planner.report import MemoryReport
from rlcm_fast.run_folder.export import Exporter
from rlcm_fast.run_folder.guard_stop import end_at_guard
from rlcm_fast.run_folder.interruption import Interrupted, StoppedByGuard
from rlcm_fast.run_folder.progress import Progress
from rlcm_fast.stages.evaluation import Evaluation
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.stages.real_images import RealImages
from rlcm_fast.stages.reward_gradients import RewardGradients
from rlcm_fast.stages.rollout import Collector
from rlcm_fast.stages.update import Updater
from rlcm_fast.stages.vae_trial import kept_decoder, restore_decoder
from rlcm_fast.tasks import Tasks


@dataclass(frozen=True)
class Parts:
    """The parts of a run; each holds what never changes between iterations and is given what does."""

    config: Config  # with numbers where it was `auto`
    tasks: Tasks
    images: TextToImage
    engine: AveragingEngine
    collector: Collector
    updater: Updater
    real_images: RealImages | None
    task_gradients: RewardGradients
    evaluation: Evaluation
    memory: MemoryReport
    progress: Progress
    export: Exporter

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of all parts but the engine as JSON, the same on every rank; every rank must call this."""
        real_images = self.real_images.state_dict() if self.real_images else None
        skipped = self.updater.skipped.in_a_row
        guard = self.evaluation.guard.state_dict() if self.evaluation.guard else None
        parts = {"tasks": self.tasks.state_dict(), "pretraining": real_images, "skipped_updates_in_a_row": skipped}
        return {**parts, "guard": guard, "decoder": kept_decoder(self.config.model, self.images.backbone)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the place where `state_dict` was taken."""
        self.tasks.load_state_dict(state["tasks"])
        self.updater.skipped.in_a_row = state.get("skipped_updates_in_a_row", 0)  # earlier versions did not count
        if self.evaluation.guard and state.get("guard"):
            self.evaluation.guard.load_state_dict(state["guard"])
        restore_decoder(state.get("decoder"), self.config.model, self.images.backbone)
        if self.real_images and state["pretraining"]:
            self.real_images.load_state_dict(state["pretraining"])

    def stopped(self, stop: Interrupted, iteration: int, say: Callable[[str], None]) -> bool:
        """Says how to go on after a stop; if a guard stopped the run, exports its best checkpoint and returns True.

        iteration: how many are finished and saved; every rank must call.
        """
        if isinstance(stop, StoppedByGuard):
            try:
                return end_at_guard(self.export, self.progress.folder.run_dir, iteration, say)
            except Exception as error:
                self.progress.rescue(error)
                raise
        say(f"stopped after {iteration} iterations; go on with --resume latest")
        return False

    def hear_out(self, may_stop: Callable[[], None]) -> dict[str, float]:
        """Waits until a person has compared the final images, or a stop is asked for; returns `rating/...`, if any."""
        with contextlib.suppress(Interrupted):  # the run is finished in any case
            self.tasks.rewards.finish(may_stop)
        return self.tasks.rewards.person_metrics()

    def close(self) -> None:
        """Stops the threads and processes that compute rewards and decode images, and lets go of the run's folder."""
        self.tasks.rewards.shutdown()
        if self.real_images:
            self.real_images.close()
        if self.collector.kept:
            self.collector.kept.delete_learned()
        self.progress.folder.close()
