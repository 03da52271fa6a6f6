"""The loop: draw images, reward them, make the actions behind good images likelier; top to bottom in `Trainer.run`.

    prompts -> rollout (trajectory, rewards) -> advantages -> update -> metrics [-> evaluation, grid, checkpoint]

once per iteration, or once for each task in turn (large-scale RL for diffusion models, arXiv 2401.12244).

RLCM (arXiv 2404.03673, algorithm 1): the multistep consistency sampler is an MDP whose actions are the next latents and
whose only reward is the decoded image's. Departures from the paper:
 1. The last, deterministic step is no action (policy.last_step=renoise follows the paper literally).
 2. A micro-batch mixes steps, and transitions are shuffled over samples and steps.
 3. With one update per rollout the ratio is 1 by construction (the paper's code clips rounding noise).
"""

# B samples of this process, A of all processes

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from rlcm_fast import parallel
from rlcm_fast.build import build
from rlcm_fast.config import Config
from rlcm_fast.given import NOTHING, Given
from rlcm_fast.run_folder.interruption import Interrupted, Interruption
from rlcm_fast.run_folder.tracking import Tracker, merged


class Trainer:
    """One run on one process; with several processes each holds its share of the prompts, and all stay in step."""

    def __init__(self, config: Config, given: Given = NOTHING) -> None:
        self.run_dir = Path(config.run_dir)
        self.interruption = Interruption(self.run_dir / "stop", not given.is_hosted)  # first: a launcher may die soon
        parts = build(config, given)
        self.tasks = parts.tasks  # prompts, rewards and advantages
        self.images = parts.images  # the policy and the pipeline around its network
        self.engine = parts.engine  # the trained weights and their optimizer
        self.collector = parts.collector  # draws images and scores them
        self.updater = parts.updater  # moves the weights
        self.evaluation = parts.evaluation  # scores held-out images, draws the grid
        self.progress = parts.progress  # saves the finished iterations
        self.config, self.parts, self.given = parts.config, parts, given
        self.iteration, self.queries = 0, 0  # finished iterations, scored images
        with contextlib.ExitStack() as stack:
            stack.callback(parts.close)  # unless all goes well
            resumed = self.progress.load()
            if resumed:
                self.load_state_dict(resumed)
            self.progress.note(self.state_dict())
            self.tracker = Tracker(self.run_dir, self.config, self.iteration, self.tasks.models_used)
            stack.pop_all()

    def run(self) -> bool:
        """Trains, evaluates and exports; tells whether it came to its end.

        Ctrl-C, SIGTERM, SIGHUP, a file run_dir/stop or a guard save a checkpoint and stop the run; after a guard's stop
        the best checkpoint before it is exported, which is an end, too. An error saves the finished iterations, if it
        left good weights, and goes on to the caller.
        """
        with self.interruption, contextlib.closing(self.tracker), contextlib.closing(self.parts):
            try:
                self.parts.memory.verdict(self.tracker.say)
                self.tracker.begin(self.tasks.num_samples)
                for iteration in range(self.iteration, self.config.num_iterations):
                    evaluated = self.evaluate(iteration)  # before this iteration's updates
                    metrics = self.train(iteration)
                    self.progress.note(self.state_dict())
                    self.tracker.log({**metrics, **evaluated})
                    self.parts.memory.compare(self.tracker.say)
                    if self.save_if_due(self.given.is_enough(iteration, {**metrics, **evaluated})):
                        break
                self.finish()
                return True
            except Interrupted as stop:
                self.progress.save_at_stop()
                return self.parts.stopped(stop, self.iteration, self.tracker.say)
            except Exception as error:
                self.progress.rescue(error)
                raise

    def train(self, iteration: int) -> dict[str, float]:
        """Runs one iteration: all tasks together or one task after another; returns its metrics."""
        self.parts.memory.begin()
        start, lr, num_rounds = time.perf_counter(), self.engine.lr, len(self.tasks.rounds)
        turns = [parallel.Turn(iteration, number, num_rounds, self.config.seed) for number in range(num_rounds)]
        metrics = merged([self.train_round(turn) for turn in turns])
        self.iteration, self.queries = iteration + 1, self.queries + self.tasks.num_samples
        measured = {**self.engine.metrics(), **self.parts.memory.metrics()}
        seconds = time.perf_counter() - start
        speed = {"seconds/iteration": seconds, "images_per_second": self.tasks.num_samples / seconds}
        return {"iteration": iteration, "queries": self.queries, "lr": lr, **metrics, **measured, **speed}

    def train_round(self, turn: parallel.Turn) -> dict[str, float]:
        """Makes one rollout and the updates on it, for all tasks or for the task whose turn it is."""
        names = self.tasks.rounds[turn.round]
        may_stop = self.interruption.check if turn.round == 0 else lambda: None  # weights have not moved yet

        # Draw images and score them; no gradients.
        prompts = self.tasks.next_batch(names)  # list[Prompt], len B
        batch = self.collector.rollout(prompts, turn, may_stop)

        # Compare them over all processes, then keep the rows of this process.
        advantages = self.tasks.advantages(*batch.gathered())  # (A,)
        sample_weights = self.updater.algorithm.sample_weights(advantages)  # (A,)
        rows = parallel.rows_of_this_process(len(prompts))
        advantages, sample_weights = advantages[rows], sample_weights[rows]  # (B,), (B,)

        # Measure before the weights move: how rounding moves the ratio, how tasks pull on the weights.
        noise = self.updater.check_ratio(batch.trajectory, turn, self.tracker.say) if turn.is_first else {}
        gradients = self.parts.task_gradients(batch, sample_weights, turn)

        # Make good actions likelier: log-probs, loss, backward pass, optimizer steps.
        updated = self.updater.update(batch.trajectory, sample_weights, turn, may_stop)

        scores = {**batch.metrics(self.tasks.are_several), **self.tasks.metrics(names)}
        return {**scores, **updated.metrics(advantages), **noise, **gradients, **batch.timings(), **updated.timings()}

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Scores held-out images and draws the grid, if they are due."""
        is_scored = self.due(self.config.evaluation.every, iteration)
        is_drawn = self.due(self.config.tracking.grid_every, iteration)
        if is_scored or is_drawn:
            self.progress.check_weights(iteration)
        return self.progress.keep_best(self.evaluation(iteration, self.tracker, is_scored, is_drawn))

    def finish(self) -> None:
        """Evaluates the final weights, writes a folder that stock diffusers loads, and hears out a person who rates."""
        self.interruption.is_training = False
        self.evaluation.end_at(self.iteration)
        counts = {"iteration": self.iteration, "queries": self.queries}
        if evaluated := self.evaluate(self.iteration):
            self.tracker.log({**counts, **evaluated})
        self.tracker.say(self.parts.export(self.run_dir, self.iteration))
        if answered := self.parts.hear_out(self.interruption.check):
            self.tracker.log({**counts, **evaluated, **answered})

    def save_if_due(self, is_enough: bool) -> bool:
        """Saves a checkpoint if one is due; tells whether the run is at its end; stops it if a process was asked to."""
        is_last = is_enough or self.iteration == self.config.num_iterations
        if is_last or self.due(self.config.checkpoint.every, self.iteration):
            self.progress.save()
        if self.interruption.agreed() and not is_last:
            raise Interrupted
        return is_last

    def due(self, every: int, iteration: int) -> bool:
        """Tells whether something is due: every `every` iterations and for the final weights; never if `every` is 0."""
        return every > 0 and (iteration % every == 0 or iteration == self.config.num_iterations)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a resumed run needs besides weights and optimizer, as JSON; random numbers need nothing."""
        return {"iteration": self.iteration, "queries": self.queries, **self.parts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the place where `state_dict` was taken."""
        self.iteration, self.queries = state["iteration"], state["queries"]
        self.parts.load_state_dict(state)
