"""Draw images from a model into one captioned grid.

An image depends on its prompt, its place and the seed only, not on how many images are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rlcm_fast.cli.arguments import add_sampling_arguments, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser)
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more prompts, each quoted")
    parser.add_argument("--num-steps", type=positive_int, default=4, help="denoising steps")
    parser.add_argument("--num-images", type=positive_int, default=4, help="images per prompt, a row of the grid")
    parser.add_argument("--out", default="grid.png", help="image file to write")


def run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"out={out} is no image file; give a name that ends in .png or .jpg")
    from rlcm_fast.cli.pipelines import draw, load_pipeline
    from rlcm_fast.grids import captioned_grid

    texts = [text for text in arguments.prompt for _ in range(arguments.num_images)]
    pipeline = load_pipeline(arguments.model, arguments.revision, arguments.device, arguments.lora)
    images, _ = draw(
        pipeline, texts, arguments.num_steps, arguments.guidance_scale, arguments.seed, arguments.batch_size
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(images, texts, columns=arguments.num_images).save(out)
    print(f"{len(images)} images in {out}")
