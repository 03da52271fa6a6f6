"""Shows and records a run: the terminal, metrics.jsonl, TensorBoard, W&B, captioned image grids, environment.

Only the main process writes. docs/runs.md has a table of all keys.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import Config, to_dict, to_yaml
from rlcm_fast.finite_json import finite_json, load_json, not_finite
from rlcm_fast.grids import captioned_grid
from rlcm_fast.report.reading import flat
from rlcm_fast.report.rewards import of_person
from rlcm_fast.run_folder.display import Clock, Display, PlainLines, is_live
from rlcm_fast.run_folder.evaluation_files import evaluation_picture, write_evaluation
from rlcm_fast.run_folder.stage_profile import IterationProfile
from rlcm_fast.terminal import write_line

_PACKAGES = ("rlcm_fast", "torch", "diffusers", "transformers", "deepspeed", "safetensors", "numpy", "pillow")
_COUNTS = ("skipped_images", "skipped_updates", "pretraining/skipped")


def merged(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merges the metrics of an iteration's rounds: sums of seconds and counts, equally weighted means else."""
    keys = dict.fromkeys(key for metrics in rounds for key in metrics)
    values = {key: [metrics[key] for metrics in rounds if key in metrics] for key in keys}
    return {key: sum(all_) if _is_sum(key) else sum(all_) / len(all_) for key, all_ in values.items()}


def _is_sum(key: str) -> bool:
    return key.startswith("seconds/") or key in _COUNTS


def say(message: str) -> None:
    """Prints a line to stderr on the main process."""
    if parallel.is_main():
        write_line(message)


class Tracker:
    """Writes the folder of one run and its lines on the terminal; does nothing on all ranks but the main one."""

    def __init__(
        self, run_dir: Path, config: Config, first_iteration: int, models: Mapping[str, Any] | None = None
    ) -> None:
        """Opens the folder and drops lines from `first_iteration` on, which is 0 or where a resumed run starts.

        models: what rewards compute on, `Tasks.models_used`, for environment.json.
        """
        self._run_dir = run_dir
        self._display: Display | None = None  # on the main rank
        self._has_report = config.tracking.report
        self._done, self._total = first_iteration, config.num_iterations
        self._events: Any = None
        self._wandb: Any = None
        self._profile = IterationProfile(run_dir / "profile", config.profile, self.say)
        if not parallel.is_main():
            return

        # Write what the run is, and open the file of its metrics.
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
        (run_dir / "environment.json").write_text(
            finite_json({**_environment(), "reward_models": dict(models or {})}, indent=2)
        )
        _drop_lines_from(run_dir / "metrics.jsonl", first_iteration)
        self._lines = (run_dir / "metrics.jsonl").open("a", buffering=1)

        # Start the trackers that the config asks for, and what the terminal shows.
        if config.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "events"), purge_step=first_iteration)
        if config.tracking.wandb:
            self._wandb = _start_wandb(run_dir, config)
        self._display = _display(config, first_iteration)

    def log(self, metrics: Mapping[str, float | int]) -> None:
        """Adds a line to metrics.jsonl and the scalars, and shows them.

        `metrics` holds `iteration` and `reward/<name>/mean`. A value that is not finite is null in the line, whose
        `not_finite` names it, and a gap in the curves of TensorBoard and W&B.
        """
        if self._display is None:
            return
        missing = not_finite(metrics)
        said = {"not_finite": missing} if missing else {}
        self._lines.write(finite_json({**metrics, **said}) + "\n")
        iteration = int(metrics["iteration"])
        curves = {key: value for key, value in metrics.items() if key not in missing}
        if self._events:
            for key, value in curves.items():
                self._events.add_scalar(key, value, iteration)
        if self._wandb:
            self._wandb.log(curves, step=iteration)
        self._display.show(curves)
        if "images_per_second" in metrics:  # the line after the last iteration has only an evaluation
            self._done = iteration + 1
            self._profile.end()
            self._profile.begin(iteration + 1)
        if self._has_report and any(key.startswith("eval/") for key in metrics):
            self._renew_report()

    def grid(self, iteration: int, images: Tensor | Sequence[Tensor], texts: Sequence[str]) -> None:
        """Saves images (B, 3, H, W) with their captions as grids/<iteration>.png and as an event.

        A list of images (3, H, W) may have several sizes.
        """
        if self._display is None:
            return
        picture = captioned_grid(images, texts, columns=4)
        path = self._run_dir / "grids" / f"{iteration:06d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        self._send("grid", iteration, picture)

    def guard(self, iteration: int, path: Path) -> None:
        """Sends the picture that the guard has written at this iteration, if it has, as an event."""
        if self._has_trackers and path.is_file():
            with Image.open(path) as picture:
                self._send("guard", iteration, picture.convert("RGB"))

    def evaluation(self, iteration: int, scores: Sequence[Mapping[str, Any]], files: Mapping[str, bytes]) -> None:
        """Saves images of an evaluation and the scores of all its images; a disk that is full costs these alone.

        A picture of the first few, with their scores, is an event.
        """
        if self._display is None:
            return
        try:
            write_evaluation(self._run_dir, iteration, scores, files)
        except OSError as error:
            self.say(f"the images of the evaluation after {iteration} iterations were not saved ({error.strerror})")
        if self._has_trackers and files:
            self._send("evaluation", iteration, evaluation_picture(scores, files))

    def begin(self, num_images: int) -> None:
        """Announces the first iteration, which scores `num_images` images on all processes together."""
        if self._display is None or self._done >= self._total:
            return
        self.say(f"first iteration: number {self._done + 1} of {self._total}, {num_images} images")
        self._profile.begin_run(self._done)
        self._display.begin()

    def say(self, message: str) -> None:
        """Prints a line for the person at the terminal, above a live view."""
        if self._display is not None:
            self._display.say(message)

    @property
    def _has_trackers(self) -> bool:
        return bool(self._events or self._wandb)

    def _send(self, key: str, iteration: int, picture: Image.Image) -> None:
        """Sends a picture to the trackers beside the folder."""
        if self._events:
            import numpy as np

            self._events.add_image(key, np.asarray(picture), iteration, dataformats="HWC")
        if self._wandb:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({key: wandb.Image(picture)}, step=iteration)

    def _renew_report(self) -> None:
        """Writes report.html anew; whatever fails there is said once and costs only the report."""
        from rlcm_fast.report import read_run, write_report

        try:
            write_report([read_run(self._run_dir)], self._run_dir / "report.html")
        except Exception as error:  # noqa: BLE001 (a run is worth more than its report)
            self._has_report = False
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.say(f"report.html was not written, and the run goes on without it ({reason})")

    def close(self) -> None:
        """Ends what the terminal shows and closes all files."""
        if self._display is None:
            return
        self._display.close()  # first: it has the terminal
        self._profile.close()
        self._lines.close()
        if self._has_report:
            self._renew_report()  # it tells how the run ended
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()


def _display(config: Config, first_iteration: int) -> Display:
    """Returns the live view, or plain lines; says if the first iteration compiles, which takes minutes."""
    is_compiled = config.engine.compile != "off" and first_iteration < config.num_iterations
    fields = flat(to_dict(config))
    if is_live(config.tracking.live):
        from rlcm_fast.run_folder.live_view import LiveView

        note = "compiling" if is_compiled else ""
        return LiveView(Clock(first_iteration, config.num_iterations), fields, note)
    if is_compiled:
        say("compiling the network: the first iteration takes longer")
    return PlainLines(first_iteration, config.num_iterations, left_out=of_person(fields))


def _drop_lines_from(path: Path, iteration: int) -> None:
    """Drops lines from `iteration` on, because the run will log these iterations again, and lines that are none.

    A run that is killed while it writes leaves a line without its end, and a power cut may leave zeros. If iterations
    before `iteration` have no line any more, that is said.
    """
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    numbered = [(_iteration_of(line), line) for line in lines]
    kept = [f"{line}\n" for number, line in numbered if number is not None and number < iteration]
    num_lost = iteration - len({number for number, _ in numbered if number is not None and number < iteration})
    if num_lost:
        say(f"{path} lacks {num_lost} of the {iteration} lines before iteration {iteration}; the run goes on without")
    if not path.exists():
        return
    whole = path.with_name(".metrics.jsonl")
    whole.write_text("".join(kept))
    os.replace(whole, path)  # at once, so that a run that is killed here loses no lines


def _iteration_of(line: str) -> int | None:
    """Returns the iteration that a line of metrics.jsonl is about; None if it is no such line."""
    try:
        metrics = load_json(line)
    except ValueError:
        return None
    number = metrics.get("iteration") if isinstance(metrics, dict) else None
    return number if isinstance(number, int) else None


def _start_wandb(run_dir: Path, config: Config) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            "tracking.wandb=true needs wandb; pip install 'rlcm_fast[wandb]', or set it to false"
        ) from error
    kept = run_dir / "wandb_id"  # a resumed run continues this W&B run
    id_ = kept.read_text() if kept.exists() else None
    settings = {"name": run_dir.name, "config": to_dict(config), "id": id_, "resume": "allow"}
    run = wandb.init(project="rlcm_fast", dir=str(run_dir), **settings)
    kept.write_text(run.id)
    return run


def _environment() -> dict[str, Any]:
    """Collects what helps to understand a run later: versions, commit, machine."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "command": sys.argv,
        "num_processes": parallel.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the source tree; None if rlcm_fast was not installed from one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
