"""DDPOTrainer with the signature of TRL 0.23, around a run of rlcm_fast."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import HfApi

from rlcm_fast.api import Run, run_here
from rlcm_fast.compat.config import DDPOConfig
from rlcm_fast.compat.fields import PROMPTS, REWARD, translated
from rlcm_fast.compat.pipeline import DefaultDDPOStableDiffusionPipeline
from rlcm_fast.compat.samples import HookTracker, RewardFunction, Samples
from rlcm_fast.config import Config, ModelConfig
from rlcm_fast.config.resolved import resolve
from rlcm_fast.given import Given
from rlcm_fast.handover import Handover
from rlcm_fast.rewards.functions import code_digest
from rlcm_fast.run_folder.tracking import say

Hook = Callable[[list[list[Any]], int, HookTracker], Any]


class DDPOTrainer:
    """Trains a Stable Diffusion pipeline by DDPO; __init__.py of this room lists what differs from TRL's."""

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: RewardFunction,
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: DefaultDDPOStableDiffusionPipeline,
        image_samples_hook: Hook | None = None,
    ) -> None:
        """Checks the config; raises ValueError with one line for a field that cannot work.

        reward_function(images, prompts, metadata)     returns (scores, information) for images (B, 3, H, W) in [0, 1]
        prompt_function()                              returns (prompt, metadata)
        image_samples_hook(batches, step, tracker)     gets [images, prompts, metadata, scores, information] a batch
        """
        if not isinstance(sd_pipeline, DefaultDDPOStableDiffusionPipeline):
            kind = type(sd_pipeline).__name__
            raise ValueError(f"sd_pipeline is a {kind}; give a DefaultDDPOStableDiffusionPipeline of rlcm_fast.compat")
        self.config, self.sd_pipeline = config, sd_pipeline
        self.prompt_fn, self.reward_fn, self.image_samples_callback = (
            prompt_function,
            reward_function,
            image_samples_hook,
        )
        self._samples = Samples(prompt_function, reward_function, keeps_batches=image_samples_hook is not None)
        self._translated = translated(config, sd_pipeline.use_lora)
        code = code_digest(reward_function)
        self._named = {
            "prompts__source": PROMPTS,
            "rewards": [{"name": REWARD, "arguments": {"code": code} if code else {}}],
        }
        self._run: Run | None = None
        self._model: ModelConfig | None = None  # of the run, once it has begun
        self._translated.config(**self._named)
        for note in self._translated.notes:
            say(note)
        _seed(config.seed)
        if config.allow_tf32 and torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True  # in the whole process, as TRL does

    def train(self, epochs: int | None = None) -> None:
        """Trains for a number of epochs, or for config.num_epochs; a second call goes on with as many more.

        A run that resumes trains up to this number. Ctrl-C saves a checkpoint and raises KeyboardInterrupt.
        """
        # The first call begins, or resumes what the config says; later calls go on.
        wanted = self.config.num_epochs if epochs is None else epochs
        if self._run is None:
            config = self._translated.config(**self._named, num_iterations=wanted)
        else:
            finished = self._run.config.num_iterations
            config = self._translated.config(**self._named, num_iterations=finished + wanted, resume="latest")
        config = replace(config, model=self._model or self.sd_pipeline.model)

        # Train from the pipeline as the script left it, and show it the result.
        pipeline = self.sd_pipeline.sd_pipeline if self._model is None and self.sd_pipeline.is_loaded else None
        tracker = HookTracker(Path(config.run_dir), config.tracking.tensorboard, config.tracking.wandb)
        try:
            run = run_here(config, self._given(config, tracker), Handover(Path(config.run_dir)), pipeline)
        finally:
            tracker.close()
        if not run.is_finished:
            raise KeyboardInterrupt(f"the finished epochs are saved; go on with resume_from={run.run_dir}")
        self._run, self._model = run, run.config.model
        self.sd_pipeline.show(run)

    def step(self, epoch: int, global_step: int) -> int:
        """Is TRL's single epoch, which a run of rlcm_fast does not offer."""
        raise ValueError(f"step({epoch}, {global_step}) is not offered; train(epochs=1) trains one epoch more")

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **hub: Any) -> None:
        """Saves the tuned pipeline with a model card, and uploads it if asked to; `hub` goes to `push_to_hub`."""
        self._save_pretrained(save_directory)
        if push_to_hub:
            repo_id = hub.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(repo_id, **hub)

    def _save_pretrained(self, save_directory: str | Path) -> None:
        self.sd_pipeline.save_pretrained(save_directory)
        card = self._card_folder()
        for name in ("README.md", "curves.png", "before.png", "after.png"):
            if (card / name).is_file():
                shutil.copy(card / name, save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using rlcm_fast",
        private: bool | None = None,
        token: str | None = None,
        **upload: Any,
    ) -> str:
        """Uploads what `save_pretrained` writes and returns the address.

        upload: further keywords of huggingface_hub's upload_folder, as revision, create_pr, allow_patterns.
        """
        api = HfApi(token=token)
        revision = upload.pop("branch", None)
        upload |= {"revision": revision} if revision is not None else {}
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self._save_pretrained(folder)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message, **upload))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Changes the model card that the run wrote: its title, its data set, further tags."""
        file = self._card_folder() / "README.md"
        _, head, body = file.read_text(encoding="utf-8").split("---\n", 2)
        fields: dict[str, Any] = yaml.safe_load(head)
        more = [tags] if isinstance(tags, str) else list(tags or [])
        fields["tags"] = list(dict.fromkeys([*fields["tags"], "ddpo", *more]))
        if dataset_name:
            fields["datasets"] = [dataset_name]
        if model_name:
            _, _, rest = body.lstrip().partition("\n")
            body = f"\n# {model_name}\n{rest}"
        file.write_text(f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n{body}", encoding="utf-8")

    def _card_folder(self) -> Path:
        if self._run is None:
            raise ValueError("the trainer has trained nothing yet; call train() first")
        return self._run.lora or self._run.run_dir / "export"

    def _given(self, config: Config, tracker: HookTracker) -> Given:
        """Returns the script's functions; the hook is called at the end of each epoch."""
        sizes, hook = resolve(config, 1).sizes, self.image_samples_callback

        def end_of_epoch(iteration: int, metrics: Mapping[str, Any]) -> bool:
            batches = self._samples.end_of_epoch()
            if hook is not None:
                hook(batches, iteration * sizes.updates_per_iteration, tracker)
            return False

        return Given({REWARD: self._samples}, {PROMPTS: self._samples.draw}, end_of_epoch, is_hosted=True)


def _seed(seed: int) -> None:
    """Seeds what prompt functions draw from, as TRL does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
