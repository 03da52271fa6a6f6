"""Makes the shipped models from a seed: VAE, decoder, teacher, LCM, report. You can resume every stage.

On two cores: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m rlcm_fast.shapes.pretrain all --seed 0 --out DIR
In one process (also on a GPU):           python -m rlcm_fast.shapes.pretrain all --seed 0 --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny
from torch import Tensor

from rlcm_fast.shapes.pretrain import dataset, folders, lcm, report, teacher, vae
from rlcm_fast.shapes.pretrain.stage import StageConfig

_STAGES = ("vae", "decoder", "teacher", "lcm", "report")


def main() -> None:
    """Run one stage, which needs the stages before it, or all stages."""
    # Read the command line.
    parser = argparse.ArgumentParser(prog="python -m rlcm_fast.shapes.pretrain", description=__doc__)
    parser.add_argument("stage", choices=(*_STAGES, "all"), help="what to make")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and the states to resume from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and of all training (default 0)")
    parser.add_argument("--num-images", type=int, default=40_000, help="training scenes (default 40,000)")
    parser.add_argument("--num-scored", type=int, default=500, help="images of each cell of the report (default 500)")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of all training steps to run, for a trial")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    # Run the stages, in every process that torchrun started.
    is_shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_shared:
        dist.init_process_group("gloo")
    for stage in _STAGES if arguments.stage == "all" else (arguments.stage,):
        with _main_process_first():
            _prepare(stage, arguments)
        _RUN[stage](arguments)
    if is_shared:  # destroy only the group that was made here
        dist.destroy_process_group()


@contextlib.contextmanager
def _main_process_first() -> Iterator[None]:
    """Run the block in the main process first, so that the others find its files."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def _prepare(stage: str, arguments: argparse.Namespace) -> None:
    """Make the data that a stage reads."""
    if stage != "report":
        _dataset(arguments)
    if stage in ("teacher", "lcm"):
        _latents(arguments)


def _vae(arguments: argparse.Namespace) -> None:
    images, _ = _dataset(arguments)
    made = vae.train_joint(images, arguments.out, arguments.seed, _scaled(vae.JOINT, arguments))
    made.save_pretrained(arguments.out / "vae_joint")


def _decoder(arguments: argparse.Namespace) -> None:
    images, _ = _dataset(arguments)
    made = vae.train_decoder(
        _load_vae(arguments, "vae_joint"), images, arguments.out, arguments.seed, _scaled(vae.DECODER, arguments)
    )
    made.save_pretrained(arguments.out / "vae_final")


def _teacher(arguments: argparse.Namespace) -> None:
    made = _trained_teacher(arguments)
    folders.save_teacher(_load_vae(arguments, "vae_final"), made.text_encoder, made.unet, arguments.out / "teacher")


def _lcm(arguments: argparse.Namespace) -> None:
    from_teacher = _trained_teacher(arguments)  # returns at once, from the finished state
    cycles = _scaled(lcm.FIRST_CYCLE, arguments), _scaled(lcm.SECOND_CYCLE, arguments)
    made = lcm.distil(from_teacher, _captioned_latents(arguments), arguments.out, arguments.seed, cycles)
    folders.save_lcm(_load_vae(arguments, "vae_final"), from_teacher.text_encoder, made, arguments.out / "lcm")


def _report(arguments: argparse.Namespace) -> None:
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    report.write_report(arguments.out, arguments.seed, arguments.num_scored)


def _trained_teacher(arguments: argparse.Namespace) -> teacher.Denoiser:
    cycles = _scaled(teacher.FIRST_CYCLE, arguments), _scaled(teacher.SECOND_CYCLE, arguments)
    return teacher.train_teacher(_captioned_latents(arguments), arguments.out, arguments.seed, cycles)


def _dataset(arguments: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """The training images and their captions, rendered once and kept."""
    path = arguments.out / "images.pt"
    if not path.exists():
        torch.save(dataset.training_images(arguments.num_images, arguments.seed), path)
    return torch.load(path, weights_only=True)


def _latents(arguments: argparse.Namespace) -> Tensor:
    """The scaled latents of the training images, computed once and kept."""
    path = arguments.out / "latents.pt"
    if not path.exists():
        autoencoder = _load_vae(arguments, "vae_joint")
        images, _ = _dataset(arguments)
        torch.save(vae.encode(autoencoder, images) * autoencoder.config["scaling_factor"], path)
    return torch.load(path, weights_only=True)


def _captioned_latents(arguments: argparse.Namespace) -> dataset.CaptionedLatents:
    _, captions = _dataset(arguments)
    return dataset.CaptionedLatents(_latents(arguments), captions)


def _load_vae(arguments: argparse.Namespace, name: str) -> AutoencoderTiny:
    made = AutoencoderTiny.from_pretrained(arguments.out / name)
    assert isinstance(made, AutoencoderTiny)
    return made.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]


def _scaled(config: StageConfig, arguments: argparse.Namespace) -> StageConfig:
    return replace(config, num_steps=max(1, round(config.num_steps * arguments.fraction)))


_RUN = {"vae": _vae, "decoder": _decoder, "teacher": _teacher, "lcm": _lcm, "report": _report}

if __name__ == "__main__":
    main()
