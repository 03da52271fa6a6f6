"""The arguments that `rlcm-fast sample` and `rlcm-fast evaluate` share."""

from __future__ import annotations

import argparse
import itertools


def add_sampling_arguments(parser: argparse.ArgumentParser, several_steps: bool) -> None:
    """Adds the arguments; num_steps is a list, of several numbers if `several_steps`."""
    model = "shapes/lcm, the export/ folder of a run, a .safetensors file, or any folder or hub id of Stable Diffusion"
    parser.add_argument("--model", required=True, metavar="MODEL", help=model)
    lora = "a LoRA to add to the model: the lora/ folder of a run, a .safetensors file or a hub id"
    parser.add_argument("--lora", metavar="LORA", help=lora)
    parser.add_argument("--revision", help="revision of a hub id")
    steps = parser.add_mutually_exclusive_group()
    count = "denoising steps" + (", one or several numbers" if several_steps else "")
    steps.add_argument(
        "--num-steps",
        nargs="+" if several_steps else 1,
        type=positive_int,
        metavar="N",
        help=f"{count}; default: those of the run that made the model, else 4",
    )
    timesteps = "the training timestep of each step, noisiest first; default: those of the run, if it named some"
    steps.add_argument("--timesteps", type=falling_ints, metavar="999,749,...", help=timesteps)
    guidance = "classifier-free guidance; 1 turns it off; default: that of the run, else 4"
    parser.add_argument("--guidance-scale", type=float, metavar="SCALE", help=guidance)
    parser.add_argument("--negative", default="", metavar="TEXT", help="negative prompt, for models with guidance")
    skip = "layers that the text encoders leave out, as diffusers counts: A1111's 2 is 1 here"
    parser.add_argument("--clip-skip", type=positive_int, metavar="N", help=skip)
    long = "prompts over 75 tokens: cut after them, or encoded in chunks of 75, as A1111 does"
    parser.add_argument("--long", choices=("cut", "chunks"), default="cut", help=long)
    parser.add_argument("--max-chunks", type=int, choices=(2, 3, 4), default=2, help="chunks that are read of a prompt")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the noise")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images drawn at once")
    size = "pixels of an image, height x width, as 1216x832; default: the size in the config of the model's UNet"
    parser.add_argument("--size", type=image_size, metavar="HxW", help=size)
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")


def check_texts(arguments: argparse.Namespace) -> None:
    """Refuses settings of texts that have no use; raises ValueError before a model loads."""
    if arguments.guidance_scale is not None:
        check_negative(arguments.negative, arguments.guidance_scale)
    if arguments.long == "cut" and arguments.max_chunks != 2:
        raise ValueError(f"max-chunks={arguments.max_chunks} has no use with long=cut; give --long chunks, too")


def check_negative(negative: str, guidance_scale: float) -> None:
    """Refuses a negative prompt without guidance."""
    if negative and guidance_scale <= 1:
        raise ValueError(
            f"negative={negative} has no use with guidance-scale={guidance_scale:g}, which is no guidance; raise it, "
            "or leave it out"
        )


def positive_int(text: str) -> int:
    return _int_from(text, 1)


def non_negative_int(text: str) -> int:
    return _int_from(text, 0)


def falling_ints(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    numbers = [int(part) for part in parts if part.isdecimal()]
    if not numbers or len(numbers) < len(parts):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give whole numbers, as 999,749,499,249")
    if any(later >= number for number, later in itertools.pairwise(numbers)):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: the numbers must fall, noisiest first")
    return numbers


def _int_from(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give a whole number of {least} or more")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """Returns height and width of a text like 1216x832."""
    height, _, width = text.lower().partition("x")
    try:
        return _int_from(height, 1), _int_from(width, 1)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is no size: give height x width in pixels, as 1216x832") from None
