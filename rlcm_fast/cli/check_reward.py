"""Check a reward before you train on it: scores, time, memory, what several threads and strange pictures do to it.

It runs on black, white and noise, and on your pictures if you give some. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rlcm_fast.cli.arguments import whole
from rlcm_fast.cli.evaluate import reward_config
from rlcm_fast.cli.output import check_device
from rlcm_fast.config import bounds
from rlcm_fast.config.files import local_path
from rlcm_fast.finite_json import finite_json

if TYPE_CHECKING:
    from torch import Tensor

    from rlcm_fast.trajectory import Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    name = "a built-in name (a wrong one lists all), package.module:Class, or a mapping as in a config"
    parser.add_argument("name", metavar="NAME", help=name)
    arguments = "keyword arguments of the reward, as in a config: '{model: folder/of/clip, dtype: bf16}'"
    parser.add_argument("--arguments", metavar="MAPPING", help=arguments)
    parser.add_argument("--image", nargs="+", metavar="FILE", help="pictures to score, all of one size")
    prompt = "a prompt for each --image, or one for all; a line of a .jsonl file works too"
    parser.add_argument("--prompt", nargs="+", default=["a photo of a cat"], metavar="TEXT", help=prompt)
    parser.add_argument("--size", type=whole(1, bounds.PIXELS), default=512, help="pixels per side, without --image")
    parser.add_argument("--device", help="where the pictures are, as cpu or cuda; default: cuda if there is one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    # Read the arguments and the pictures before anything is built.
    config = reward_config(arguments.name, arguments.arguments)
    check_device(arguments.device)
    from rlcm_fast.cli.reward_checks import Finding, Pictures, Verdict, findings_of
    from rlcm_fast.cli.scoring import device_of

    pictures = Pictures(*_pictures(arguments, device_of(arguments.device)))

    # Check, and print what came out.
    findings: list[Finding] = findings_of(config, pictures)
    failed = [finding for finding in findings if finding.verdict is Verdict.FAILED]
    if arguments.json:
        print(finite_json({"reward": config.name, "arguments": config.arguments, **_report(findings)}, indent=2))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{finding.verdict.value:<6} {finding.what:<{width}}  {finding.words}")
        wrong = "; ".join(finding.what for finding in failed)
        print(f"{config.name}: " + (f"failed: {wrong}" if failed else "it can be trained on"))
    return 1 if failed else 0


def _report(findings: list[Any]) -> dict[str, Any]:
    checks = {item.what: {"verdict": item.verdict.value, "words": item.words, **item.numbers} for item in findings}
    return {"checks": checks}


def _pictures(arguments: argparse.Namespace, device: Any) -> tuple[Tensor, list[Prompt], list[str]]:
    """The pictures (B, 3, H, W) of the command line after black, white and noise; their prompts and their names."""
    import torch

    # Read the pictures that the command line names.
    given = [_read(path) for path in arguments.image or []]
    for path, image in zip(arguments.image or [], given, strict=True):
        if image.shape != given[0].shape:
            sizes = [f"{shape[2]} x {shape[1]}" for shape in (given[0].shape, image.shape)]
            raise ValueError(f"image={path} has {sizes[1]} pixels, and the first has {sizes[0]}; give one size")

    # Give each a prompt.
    prompts = [_prompt(text) for text in arguments.prompt]
    if len(prompts) not in (1, len(given)):
        raise ValueError(f"prompt has {len(prompts)} entries for {len(given)} images; give one, or one for each image")
    of_given = prompts * len(given) if len(prompts) == 1 else prompts

    # Put the strange ones before them.
    height, width = given[0].shape[1:] if given else (arguments.size, arguments.size)
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    strange = [torch.zeros_like(noise), torch.ones_like(noise), noise]
    names = ["black", "white", "noise", *(arguments.image or [])]
    return torch.stack([*strange, *given]).to(device), [prompts[0]] * 3 + of_given, names


def _read(path: str) -> Tensor:

    from rlcm_fast.cli.pictures import open_picture, read_picture

    return read_picture(open_picture(local_path(path), "image"), "image")


def _prompt(text: str) -> Prompt:
    from rlcm_fast.prompts.files import parse_json_line
    from rlcm_fast.trajectory import Prompt

    if not text.startswith("{"):
        return Prompt(text)
    try:
        return parse_json_line(text)
    except ValueError as error:
        raise ValueError(f"prompt {error}") from error
