"""Samples of a model before and after a run, same prompts and noise: a picture with every image's scores.

    python benchmarks/learning/before_after.py --tuned runs/compressibility/seed_0/export \\
        --rewards jpeg_compressibility shapes_alignment --out docs/before_after.png

A column for each prompt; the rows are the base model, then the tuned one at four and at two steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.shared.reporting import print_summary


def main() -> int:
    arguments = _parser().parse_args()
    try:
        means = draw_rows(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_summary({"means": means, "picture": str(arguments.out)})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", required=True, metavar="DIR", help="export/ folder of a run")
    parser.add_argument("--base", default="shapes/lcm", metavar="DIR", help="the model it started from")
    parser.add_argument("--rewards", nargs="+", default=["jpeg_compressibility", "shapes_alignment"], metavar="NAME")
    parser.add_argument(
        "--prompts", default="shapes:one:held_out", metavar="SOURCE", help="as prompts.source in a config"
    )
    parser.add_argument("--columns", type=int, default=8, help="prompts, each an image a row (default 8)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="default 4")
    parser.add_argument("--seed", type=int, default=0, help="of noise and prompt order (default 0)")
    parser.add_argument("--out", type=Path, default=Path("docs/before_after.png"))
    return parser


def draw_rows(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Draws the picture; row -> reward -> mean of what is shown."""
    import torch

    from rlcm_fast.cli.pipelines import draw, load_pipeline
    from rlcm_fast.grids import captioned_grid
    from rlcm_fast.prompts import load_prompts, prompts_for_images
    from rlcm_fast.rewards import build_reward

    # Load both models, what they draw and what they are scored by.
    rewards = {name: build_reward(name, {}) for name in arguments.rewards}
    prompts = prompts_for_images(load_prompts(arguments.prompts, "prompts"), arguments.columns, arguments.seed)
    texts = [prompt.text for prompt in prompts]
    before, after = load_pipeline(arguments.base), load_pipeline(arguments.tuned)

    # Draw and score row by row; a caption has the scores of its image.
    images, labels, means = [], [], {}
    for name, pipeline, num_steps in (("before", before, 4), ("after", after, 4), ("after", after, 2)):
        row = f"{name}, {num_steps} steps"
        drawn, _ = draw(pipeline, texts, num_steps, arguments.guidance_scale, arguments.seed, len(texts))
        scores = {name: reward(drawn, prompts) for name, reward in rewards.items()}
        means[row] = {name: values.mean().item() for name, values in scores.items()}
        for i, text in enumerate(texts):
            shown = " ".join(f"{values[i].item():.2f}" for values in scores.values())
            labels.append(f"{row}: {text} [{shown}]")
        images.append(drawn)

    # Put the rows together.
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(torch.cat(images), labels, columns=len(texts)).save(arguments.out)
    return means


if __name__ == "__main__":
    sys.exit(main())
