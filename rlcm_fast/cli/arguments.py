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
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the noise")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images drawn at once")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")


def positive_int(text: str) -> int:
    return _int_from(text, 1)


def non_negative_int(text: str) -> int:
    return _int_from(text, 0)


def _int_from(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give a whole number of {least} or more")
    return int(text)
