"""The arguments that `rlcm-fast sample` and `rlcm-fast evaluate` share."""

from __future__ import annotations

import argparse


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    model = "shapes/lcm, shapes/teacher, the export/ folder of a run, or any LCM or Stable Diffusion folder or hub id"
    parser.add_argument("--model", required=True, metavar="DIR", help=model)
    lora = "a LoRA to add to the model: the lora/ folder of a run, a .safetensors file or a hub id"
    parser.add_argument("--lora", metavar="DIR", help=lora)
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="classifier-free guidance; 1 turns it off")
    parser.add_argument("--negative", default="", metavar="TEXT", help="negative prompt, for models with guidance")
    skip = "layers that the text encoders leave out, as diffusers counts: A1111's 2 is 1 here"
    parser.add_argument("--clip-skip", type=positive_int, metavar="N", help=skip)
    long = "prompts over 75 tokens: cut after them, or encoded in chunks of 75, as A1111 does"
    parser.add_argument("--long", choices=("cut", "chunks"), default="cut", help=long)
    parser.add_argument("--max-chunks", type=int, choices=(2, 3, 4), default=2, help="chunks that are read of a prompt")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the noise")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images drawn at once")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")


def check_texts(arguments: argparse.Namespace) -> None:
    """Refuses settings of texts that have no use; raises ValueError before a model loads."""
    if arguments.negative and arguments.guidance_scale <= 1:
        raise ValueError(
            f"negative={arguments.negative} has no use with guidance-scale={arguments.guidance_scale:g}, which is no "
            "guidance; raise it, or leave it out"
        )
    if arguments.long == "cut" and arguments.max_chunks != 2:
        raise ValueError(f"max-chunks={arguments.max_chunks} has no use with long=cut; give --long chunks, too")


def positive_int(text: str) -> int:
    return _int_from(text, 1)


def non_negative_int(text: str) -> int:
    return _int_from(text, 0)


def _int_from(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give a whole number of {least} or more")
    return int(text)
