"""Score any pictures by rewards: JSON, and with --out also CSV and a sorted contact sheet of each reward.

Line i of the prompts belongs to picture i in the order of the file names, where 2.png comes before 10.png.
"""

from __future__ import annotations

import argparse
import csv
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcm_fast.cli.arguments import whole
from rlcm_fast.cli.evaluate import REWARDS_HELP, reward_configs, statistics
from rlcm_fast.cli.output import check_device, check_out_folder, write
from rlcm_fast.config import bounds
from rlcm_fast.finite_json import finite_json

if TYPE_CHECKING:
    from torch import Tensor

    from rlcm_fast.cli.pictures import Picture
    from rlcm_fast.rewards import Reward
    from rlcm_fast.trajectory import Prompt

MOST_SHOWN = 48  # pictures of a contact sheet: the best half and the worst half
_COLUMNS = 8
_TILE = 192  # pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, metavar="FOLDER", help="folder of PNG, JPEG, WebP or BMP files")
    prompts = "a .txt or .jsonl file: a line per picture, in the order of the file names, or one line for all"
    parser.add_argument("--prompts", required=True, metavar="FILE", help=prompts)
    repeats = "pictures of each prompt, side by side in the order of names"
    parser.add_argument("--images-per-prompt", type=whole(1, bounds.IMAGES), default=1, metavar="N", help=repeats)
    parser.add_argument("--rewards", nargs="+", required=True, metavar="NAME", help=REWARDS_HELP)
    parser.add_argument(
        "--batch-size", type=whole(1, bounds.BATCH), default=16, help="pictures of one size scored at once"
    )
    parser.add_argument("--device", help="where the pictures are, as cpu or cuda; default: cuda if there is one")
    out = "folder for scores.json, scores.csv and sheet_NAME.png; default: JSON on stdout"
    parser.add_argument("--out", metavar="FOLDER", help=out)


def run(arguments: argparse.Namespace) -> None:
    # Check everything that needs no reward.
    configs = reward_configs(arguments.rewards)
    out = None if arguments.out is None else check_out_folder(arguments.out)
    check_device(arguments.device)
    from rlcm_fast.cli.pictures import find_pictures

    pictures = find_pictures(arguments.images)
    prompts = prompts_of(pictures, arguments.prompts, arguments.images_per_prompt)

    # Build the rewards and score.
    from rlcm_fast.cli.scoring import device_of
    from rlcm_fast.rewards import build_rewards, check_groups

    device = device_of(arguments.device)
    rewards = {name: reward for name, (reward, _) in build_rewards(configs).items()}
    check_groups(rewards, len(pictures))
    scored = score_pictures(pictures, prompts, rewards, arguments.batch_size, device)

    # Write, or print.
    report = report_of(arguments, pictures, prompts, scored)
    if out is None:
        print(finite_json(report, indent=2))
        return
    text = finite_json(report, indent=2) + "\n"
    write(out / "scores.json", lambda path: path.write_text(text, encoding="utf-8"))
    write(out / "scores.csv", lambda path: write_table(path, report["pictures"], list(rewards)))
    for name, of_reward in scored.items():
        sheet = contact_sheet(pictures, prompts, of_reward.scores.tolist())
        write(out / f"sheet_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png", sheet.save)
    for name, of_reward in scored.items():
        numbers = statistics(of_reward.values)
        print(f"{name}: mean {numbers['mean']:.4g}, std {numbers['std']:.4g}")
    print(f"{len(pictures)} pictures in {out}: scores.json, scores.csv, sheet_NAME.png")


def prompts_of(pictures: Sequence[Picture], source: str, repeats: int) -> list[Prompt]:
    """The prompt of each picture; raises ValueError unless there are as many lines as needed, or one for all."""
    from rlcm_fast.prompts import load_prompts

    prompts = list(load_prompts(source, "prompts"))
    if len(prompts) == 1:
        return prompts * len(pictures)
    if len(prompts) * repeats != len(pictures):
        first, last = pictures[0].path.name, pictures[-1].path.name
        raise ValueError(
            f"prompts={source} holds {len(prompts)} prompts, with images-per-prompt={repeats}, for {len(pictures)} "
            f"pictures ({first} ... {last}); give a line per picture in the order of names, or one line for all"
        )
    return [prompt for prompt in prompts for _ in range(repeats)]


def _read(picture: Picture) -> Tensor:
    from rlcm_fast.cli.pictures import read_picture

    return read_picture(picture)


@dataclass(frozen=True)
class Scored:
    """What one reward found."""

    scores: Tensor  # (N,) float32, of each picture; for a set reward, the value of the picture's group
    values: Tensor  # (N,), or (G,) values of groups
    seconds_per_picture: float


def score_pictures(
    pictures: Sequence[Picture],
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    batch_size: int,
    device: Any,
) -> dict[str, Scored]:
    """Scores the pictures by every reward, in batches of one size."""
    import torch

    from rlcm_fast.cli.scoring import raw_scores
    from rlcm_fast.rewards import evaluate

    # Score batch by batch, each reward for itself, so that it can be timed; the first picture warms it up.
    rows: list[int] = []
    raw: dict[str, list[Tensor]] = {name: [] for name in rewards}
    seconds = dict.fromkeys(rewards, 0.0)
    for batch in _batches(pictures, batch_size):
        images = torch.stack([_read(pictures[row]) for row in batch]).to(device)
        of_batch = [prompts[row] for row in batch]
        for name, reward in rewards.items():
            if not rows:
                raw_scores(name, reward, images[:1], of_batch[:1])
            start = time.perf_counter()
            raw[name].append(raw_scores(name, reward, images, of_batch))  # on the CPU, so that the GPU has finished
            seconds[name] += time.perf_counter() - start
        rows += batch

    # Put the scores into the order of the pictures; value the groups of set rewards.
    scored = {}
    for name, reward in rewards.items():
        joined = torch.cat(raw[name])
        in_order = torch.empty_like(joined)
        in_order[rows] = joined
        values = evaluate(name, reward, in_order, prompts, iteration=0)
        scores = _of_each_picture(reward, values, prompts)
        scored[name] = Scored(scores, values, seconds[name] / len(pictures))
    return scored


def _of_each_picture(reward: Reward, values: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The score (N,) of each picture; for a set reward, the value of its group."""
    from rlcm_fast.rewards import GroupReward
    from rlcm_fast.rewards.groups import side_by_side

    if not isinstance(reward, GroupReward):
        return values
    scores = values.new_empty(len(prompts))
    groups = reward.groups(len(prompts))
    scores[side_by_side(prompts)] = values.repeat_interleave(groups.shape[1])
    return scores


def report_of(
    arguments: argparse.Namespace,
    pictures: Sequence[Picture],
    prompts: Sequence[Prompt],
    scored: Mapping[str, Scored],
) -> dict[str, Any]:
    """The report as JSON: statistics of each reward, then every picture."""
    of_rewards = {
        name: {**statistics(of_reward.values), "seconds_per_picture": of_reward.seconds_per_picture}
        for name, of_reward in scored.items()
    }
    of_pictures = []
    for row, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        scores = {name: of_reward.scores[row].item() for name, of_reward in scored.items()}
        of_pictures.append({"file": picture.path.name, "prompt": prompt.text, "scores": scores})
    settings = {name: getattr(arguments, name) for name in ("images", "prompts", "images_per_prompt")}
    return {**settings, "rewards": of_rewards, "pictures": of_pictures}


def write_table(path: Path, of_pictures: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Writes a row per picture: file, prompt, and a column per reward."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "prompt", *names])
        for row in of_pictures:
            table.writerow([row["file"], row["prompt"], *(row["scores"][name] for name in names)])


def contact_sheet(pictures: Sequence[Picture], prompts: Sequence[Prompt], scores: Sequence[float]) -> Any:
    """The pictures, best first, each with its rank, score and prompt; of many, the best half and the worst half."""
    import torch

    from rlcm_fast.grids import captioned_grid

    ranked = sorted(range(len(pictures)), key=lambda row: -scores[row])
    shown = list(enumerate(ranked, start=1))
    if len(shown) > MOST_SHOWN:
        shown = shown[: MOST_SHOWN // 2] + shown[-MOST_SHOWN // 2 :]
    tiles = torch.stack([_tile(_read(pictures[row])) for _, row in shown])
    captions = [f"{rank}. {scores[row]:.4g} {_shortened(prompts[row].text)}" for rank, row in shown]
    return captioned_grid(tiles, captions, columns=_COLUMNS)


def _tile(image: Tensor) -> Tensor:
    """The image (3, H, W), fitted into a white square (3, 192, 192)."""
    from torch.nn.functional import interpolate

    scale = _TILE / max(image.shape[1:])
    height, width = (max(1, round(side * scale)) for side in image.shape[1:])
    fitted = interpolate(image[None], (height, width), mode="bilinear", antialias=scale < 1)[0]
    tile = image.new_ones(3, _TILE, _TILE)
    top, left = (_TILE - height) // 2, (_TILE - width) // 2
    tile[:, top : top + height, left : left + width] = fitted
    return tile


def _shortened(text: str, most: int = 70) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _batches(pictures: Sequence[Picture], batch_size: int) -> Iterator[list[int]]:
    """The rows of pictures of one size, `batch_size` at most, sizes in the order in which they first appear."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for row, picture in enumerate(pictures):
        by_size.setdefault(picture.size, []).append(row)
    for rows in by_size.values():
        for first in range(0, len(rows), batch_size):
            yield rows[first : first + batch_size]
