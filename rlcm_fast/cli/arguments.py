"""Arguments that several commands share: of the sampler, numbers, and overrides of a config beside own options."""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
from collections.abc import Callable, Sequence

from rlcm_fast.config import bounds
from rlcm_fast.config.bounds import Bound
from rlcm_fast.config.files import check_text

_LONGEST = 20  # digits of a number; Python refuses to read thousands


def check_overrides(overrides: Sequence[str], own: Sequence[str]) -> None:
    """Refuses what is nearly one of the command's own options; the config checks the other words.

    Raises:
        ValueError: a name is no field of the config, and an option of `own` is closer to it than every field.
    """
    names = [word.partition("=")[0] for word in overrides if word.startswith("--")]
    if not names:
        return
    from rlcm_fast.config import field_names

    fields = [f"--{name}" for name in field_names()]
    for name in names:
        near = [] if name.rstrip("+") in fields else difflib.get_close_matches(name, [*own, *fields], n=1, cutoff=0.75)
        if near and near[0] in own:
            raise ValueError(
                f"{name} is no option of this command, and no field of the config; did you mean {near[0]}? --help lists"
                " the options"
            )


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
        type=whole(1, bounds.STEPS),
        metavar="N",
        help=f"{count}; default: those of the run that made the model, else 4",
    )
    timesteps = "the training timestep of each step, noisiest first; default: those of the run, if it named some"
    steps.add_argument("--timesteps", type=falling_ints, metavar="999,749,...", help=timesteps)
    guidance = "classifier-free guidance; 1 turns it off; default: that of the run, else 4"
    parser.add_argument("--guidance-scale", type=real(0, bounds.GUIDANCE), metavar="SCALE", help=guidance)
    parser.add_argument("--negative", default="", metavar="TEXT", help="negative prompt, for models with guidance")
    skip = "layers that the text encoders leave out, as diffusers counts: A1111's 2 is 1 here"
    parser.add_argument("--clip-skip", type=whole(1, bounds.LAYERS), metavar="N", help=skip)
    long = "prompts over 75 tokens: cut after them, or encoded in chunks of 75, as A1111 does"
    parser.add_argument("--long", choices=("cut", "chunks"), default="cut", help=long)
    parser.add_argument("--max-chunks", type=int, choices=(2, 3, 4), default=2, help="chunks that are read of a prompt")
    parser.add_argument("--seed", type=whole(0, bounds.TOOL_SEED), default=0, help="seed of the noise")
    parser.add_argument("--batch-size", type=whole(1, bounds.BATCH), default=16, help="images drawn at once")
    size = "pixels of an image, height x width, as 1216x832; default: the size in the config of the model's UNet"
    parser.add_argument("--size", type=image_size, metavar="HxW", help=size)
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")


def check_texts(arguments: argparse.Namespace) -> None:
    """Refuses settings of texts that have no use, and timesteps of no model; raises ValueError before one loads."""
    check_text("negative", arguments.negative)
    if arguments.guidance_scale is not None:
        check_negative(arguments.negative, arguments.guidance_scale)
    if arguments.timesteps and arguments.timesteps[0] >= bounds.STEPS.most:
        raise ValueError(
            f"timesteps={arguments.timesteps} must lie in [0, 999], the timesteps of training; give others"
        )
    if arguments.long == "cut" and arguments.max_chunks != 2:
        raise ValueError(f"max-chunks={arguments.max_chunks} has no use with long=cut; give --long chunks, too")


def check_negative(negative: str, guidance_scale: float) -> None:
    """Refuses a negative prompt without guidance."""
    if negative and guidance_scale <= 1:
        raise ValueError(
            f"negative={negative} has no use with guidance-scale={guidance_scale:g}, which is no guidance; raise it, "
            "or leave it out"
        )


def whole(low: int, bound: Bound) -> Callable[[str], int]:
    """Returns what reads a whole number from `low` up to a bound."""

    def read(text: str) -> int:
        is_number = text.isdecimal() and len(text) <= _LONGEST
        if not is_number or not low <= int(text) <= bound.most:
            beyond = text.isdecimal() and (not is_number or int(text) > bound.most)
            way_out = f"at most {bound}: {bound.reason}" if beyond else f"a whole number of {low} or more"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: give {way_out}")
        return int(text)

    return read


def real(low: float, bound: Bound) -> Callable[[str], float]:
    """Returns what reads a number from `low` up to a bound; NaN and infinity are none."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number <= bound.most:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: give a number from {low:g} to {bound}")
        return number

    return read


def falling_ints(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    numbers = [int(part) for part in parts if part.isdecimal() and len(part) <= _LONGEST]
    if not numbers or len(numbers) < len(parts):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give whole numbers, as 999,749,499,249")
    if any(later >= number for number, later in itertools.pairwise(numbers)):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: the numbers must fall, noisiest first")
    return numbers


def image_size(text: str) -> tuple[int, int]:
    """Returns height and width of a text like 1216x832."""
    height, _, width = text.lower().partition("x")
    try:
        side = whole(1, bounds.PIXELS)
        return side(height), side(width)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text} is no size: give height x width in pixels, as 1216x832 ({error})"
        ) from None
