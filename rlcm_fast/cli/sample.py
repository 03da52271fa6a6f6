"""Draw images from a model into one captioned grid.

An image depends on its prompt, its place and the seed only, not on how many images are drawn.
"""

from __future__ import annotations

import argparse

from rlcm_fast.cli.arguments import add_sampling_arguments, check_texts, whole
from rlcm_fast.cli.output import PICTURES, check_device, check_out, write
from rlcm_fast.config import bounds
from rlcm_fast.config.files import check_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_arguments(parser, several_steps=False)
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more prompts, each quoted")
    parser.add_argument(
        "--num-images", type=whole(1, bounds.GRID), default=4, help="images per prompt, a row of the grid"
    )
    parser.add_argument("--out", default="grid.png", help="image file to write")


def run(arguments: argparse.Namespace) -> None:
    # Check the arguments before anything is drawn.
    out = check_out(arguments.out, PICTURES)
    check_device(arguments.device)
    check_texts(arguments)
    for text in arguments.prompt:
        check_text("prompt", text)
    count = len(arguments.prompt) * arguments.num_images
    if count > bounds.GRID.most:
        raise ValueError(f"num-images={arguments.num_images} makes {count} images; give fewer: {bounds.GRID.reason}")
    from rlcm_fast.cli.pipelines import draw, encoder_of, load_pipeline, set_size, text_settings
    from rlcm_fast.cli.sampling import Sampling, sampler_of
    from rlcm_fast.grids import captioned_grid

    # Draw the images and write the grid.
    texts = [text for text in arguments.prompt for _ in range(arguments.num_images)]
    reading = text_settings(arguments)
    pipeline = load_pipeline(arguments.model, arguments.revision, arguments.device, arguments.lora)
    set_size(pipeline, arguments.size)
    sampling = Sampling.settle(pipeline, arguments)
    settings = (sampling.num_steps[0], sampling.guidance_scale, arguments.seed, arguments.batch_size)
    images, _ = draw(pipeline, texts, *settings, encoder_of(pipeline, reading, arguments.prompt))
    write(out, captioned_grid(images, texts, columns=arguments.num_images).save)
    drawn = f"{sampling.num_steps[0]} steps, guidance {sampling.guidance_scale:g}"
    print(f"{len(images)} images in {out} ({sampler_of(pipeline)}; {drawn})")
