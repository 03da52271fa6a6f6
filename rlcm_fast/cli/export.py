"""Write a run's weights for other tools: diffusers, ComfyUI, A1111; as a folder, one file, or a LoRA.

The run stays as it is, and may go on afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcm_fast.cli.arguments import real, whole
from rlcm_fast.cli.output import check_out_folder
from rlcm_fast.config import bounds

if TYPE_CHECKING:
    from rlcm_fast.run_folder.formats import Export

FORMATS = ("diffusers", "single-file", "lora", "safetensors-unet")
DTYPES = ("fp32", "fp16", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run, its run_dir")
    kinds = "single-file: with text encoders and VAE, for ComfyUI and A1111; lora: adapters alone"
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help=kinds)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="precision of the file")
    parser.add_argument(
        "--iteration", type=whole(0, bounds.UPDATES), metavar="N", help="checkpoint; default: the newest"
    )
    best = "the best checkpoint by the run's checkpoint.best, instead of the newest"
    parser.add_argument("--best", action="store_true", help=best)
    parser.add_argument("--out", metavar="DIR", help="folder to write; default: RUN/exports/FORMAT")
    guidance = "what a UNet with an input for guidance is fixed to in a single file; default: the run's"
    parser.add_argument("--guidance-scale", type=real(0, bounds.GUIDANCE), metavar="SCALE", help=guidance)
    rank = "write the difference to the start model as a LoRA of this rank, for runs that trained all weights"
    parser.add_argument("--extract-lora", type=whole(1, bounds.RANK), metavar="RANK", help=rank)
    relative = (
        "the difference is to this model's UNet (a diffusers folder, a file or a hub id); default: the start model"
    )
    parser.add_argument("--relative-to", metavar="MODEL", help=relative)
    hub = "also upload the folder to this repository of the Hugging Face hub, made if it is not there"
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help=hub)
    parser.add_argument("--private", action="store_true", help="make the new repository of --push-to-hub private")
    images = "images to draw with the model and with its extracted LoRA, for the error that is stated; 0: none"
    parser.add_argument("--num-images", type=whole(0, bounds.GRID), default=4, help=images)


def run(arguments: argparse.Namespace) -> None:
    # Check the arguments, the run and the output before any weights load.
    _check_arguments(arguments)
    rank = arguments.extract_lora
    wanted = arguments.format if rank is None else "lora"
    out = None if arguments.out is None else check_out_folder(arguments.out)
    if arguments.push_to_hub is not None:
        _check_hub(arguments.push_to_hub, out)
    from rlcm_fast.run_folder.formats import Export, FinishedRun

    run_dir, iteration = arguments.run_dir, arguments.iteration
    found = FinishedRun.find_best(run_dir) if arguments.best else FinishedRun.find(run_dir, iteration)
    if wanted == "lora" and rank is None and not found.has_adapters:
        raise ValueError(
            f"format=lora finds no adapters: run={arguments.run_dir} trained all weights; give --extract-lora 64, which"
            " writes the difference to its start model as a LoRA"
        )
    out = out or check_out_folder(str(Path(arguments.run_dir) / "exports" / wanted))
    scale = found.config.policy.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale
    export = Export(found, out, arguments.dtype, scale, arguments.push_to_hub)

    # Write it, and upload it; a model that the format has no place for leaves no empty folder.
    try:
        _write(export, wanted, arguments)
    except ValueError:
        with contextlib.suppress(OSError):
            out.rmdir()
        raise
    if arguments.push_to_hub is not None:
        from rlcm_fast.cli.hub import upload

        message = f"{found.run_dir.resolve().name} after {found.iteration} iterations"
        print(f"uploaded: {upload(out, arguments.push_to_hub, arguments.private, message)}")


def _write(export: Export, wanted: str, arguments: argparse.Namespace) -> None:
    if arguments.extract_lora is not None:
        _extract(export, arguments)
        return
    write = {
        "diffusers": export.diffusers,
        "single-file": export.single_file,
        "safetensors-unet": export.safetensors_unet,
        "lora": export.lora,
    }[wanted]
    print(f"iteration {export.run.iteration} of {export.run.run_dir} in {write()}", flush=True)


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses arguments that contradict each other or would do nothing; raises ValueError."""
    wanted, rank, scale = arguments.format, arguments.extract_lora, arguments.guidance_scale
    if rank is not None and wanted not in ("lora", "diffusers"):
        raise ValueError(f"extract-lora={rank} writes a LoRA, not format={wanted}; leave one of them out")
    if arguments.relative_to is not None and rank is None:
        raise ValueError(f"relative-to={arguments.relative_to} is for --extract-lora RANK; give it, too")
    if scale is not None and wanted not in ("single-file", "safetensors-unet"):
        raise ValueError(
            f"guidance-scale={scale:g} is for --format single-file and safetensors-unet, whose UNet has no input for"
            f" it; format={wanted if rank is None else 'lora'} keeps the input, so leave it out"
        )
    if arguments.best and arguments.iteration is not None:
        raise ValueError(
            f"iteration={arguments.iteration} and best=true each choose a checkpoint; leave one of them out"
        )
    if arguments.private and arguments.push_to_hub is None:
        raise ValueError("private=true is for --push-to-hub OWNER/NAME; give it, too")


def _check_hub(repository: str, out: Path | None) -> None:
    """Refuses a repository, or a folder that would be uploaded with files of others in it; raises ValueError."""
    from rlcm_fast.cli.hub import check_repository
    from rlcm_fast.run_folder.sampler_file import SAMPLER_FILE

    check_repository(repository)
    others = [] if out is None or (out / SAMPLER_FILE).is_file() else sorted(file.name for file in out.iterdir())
    if others:
        raise ValueError(
            f"push-to-hub={repository} uploads all of out={out}, which holds other files, such as {others[0]}; give a"
            " new folder"
        )


def _extract(export: Export, arguments: argparse.Namespace) -> None:
    """Writes the difference as a LoRA and says what it leaves out, of the weights and of images."""
    from rlcm_fast.cli.pipelines import load_pipeline

    other = arguments.relative_to
    start = None if other is None else load_pipeline(other, device="cpu").components["unet"]
    file, extracted = export.extracted_lora(arguments.extract_lora, start)
    print(f"iteration {export.run.iteration} of {export.run.run_dir} in {file}")
    print(
        f"the LoRA leaves out {extracted.error:.1%} of the change of the weights, {extracted.unreachable:.1%} of it in"
        " norms and biases"
    )
    if arguments.num_images:
        with_lora, without = image_errors(export, file, arguments)
        print(
            f"{arguments.num_images} images of both differ by {with_lora:.4f} on average (pixels in [0, 1]);"
            f" without the LoRA by {without:.4f}"
        )


def image_errors(export: Export, file: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    """Mean absolute difference of pixels to the tuned model's images: of the other model with the LoRA, and without."""
    import torch

    from rlcm_fast.backbones.assembly import assemble, fuse_lora
    from rlcm_fast.cli.pipelines import draw, load_pipeline
    from rlcm_fast.cli.policy_scheduler import PolicyScheduler
    from rlcm_fast.prompts import load_prompts, prompts_for_images

    # Draw the same images with each, as the run drew them.
    config = export.run.config
    prompts = prompts_for_images(load_prompts(config.evaluation.prompts, "prompts"), arguments.num_images, config.seed)
    settings = ([p.text for p in prompts], config.policy.num_steps, config.policy.guidance_scale, config.seed, 4)

    def drawn(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = PolicyScheduler(config.policy, tuned.unet.config, tuned_scheduler)
        return draw(pipeline, *settings)[0]

    backbone, weights = export.run.load()
    tuned = backbone.with_weights(weights)
    tuned_scheduler = tuned.scheduler
    expected = drawn(tuned)
    if arguments.relative_to is None:
        other: Any = assemble(config.model, torch.float32, config.policy.kind)
    else:
        other = load_pipeline(arguments.relative_to, device="cpu")
    without = drawn(other)
    fuse_lora(other, str(file), f"lora={file}")
    return (drawn(other) - expected).abs().mean().item(), (without - expected).abs().mean().item()
