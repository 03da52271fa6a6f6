"""What the study of guards says of its runs: when a guard spoke, what raise_kl held, what each reward gained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DETECTOR, KB, BLANK_KB = "guard/shapes_alignment", "guard/jpeg_kb", 0.69


@pytest.fixture
def guards(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("learning.guards")


def seen(values: list[float], key: str = DETECTOR) -> list[dict[str, Any]]:
    """Rows with a measurement every 64 queries."""
    return [{"iteration": place, "seen": 64 * place, key: value} for place, value in enumerate(values)]


def test_a_collapse_starts_where_the_detector_was_last_at_95_percent_of_its_start(guards: ModuleType):
    assert guards.start_of_collapse(seen([0.8, 0.7, 0.76, 0.5])) == 128
    assert guards.start_of_collapse(seen([0.8, 0.7, 0.7])) == 0
    assert guards.start_of_collapse([*seen([0.8, 0.79]), {"seen": 128}]) == 64, "a row without a measurement"


def test_the_first_below_a_level_may_never_come(guards: ModuleType):
    assert guards.first_below([{"seen": 0}, *seen([0.8, 0.04, 0.01])], DETECTOR, 0.05) == 64
    assert guards.first_below(seen([0.8, 0.05]), DETECTOR, 0.05) is None


def test_a_measure_is_outside_of_either_end_of_its_band(guards: ModuleType):
    def row(number: int, value: float, **ends: float) -> dict[str, Any]:
        return {"seen": number, "guard/size": value, **{f"guard/size/{end}": level for end, level in ends.items()}}

    assert guards.first_outside([row(0, 5, low=4, high=6), row(1, 6.1, low=4, high=6)], "size") == 1
    assert guards.first_outside([row(0, 3, low=4)], "size") == 0
    assert guards.first_outside([row(0, 3, high=4), row(1, 4, high=4)], "size") is None
    assert guards.first_outside([{"seen": 0, "guard/size/low": 4.0}, row(1, 9)], "size") is None, "no band, no value"


def test_raise_kl_tells_the_lowest_payload_of_those_with_the_detector_and_the_last_quarter(guards: ModuleType):
    # The payload, above a blank image's size, falls by a tenth each time; the detector fails at the last but one.
    rows = seen([1.0, 1.0, 0.96, 1.0, 0.97, 0.95, 0.9, 1.0])
    for place, row in enumerate(rows):
        row[KB] = BLANK_KB + 1 - place / 10
    rows[-1] |= {KB: BLANK_KB + 0.8, "guard/kl_weight": 0.5}
    found = guards.raise_kl({"raise_kl": [rows]})["seeds"][0]
    best, last = found["lowest_payload_with_detector_at_95"], found["last"]
    assert (best["iteration"], best["payload"], best["detector"]) == (5, pytest.approx(-0.5), 0.95)
    assert (last["queries"], last["payload"], last["kl_weight"]) == (448, pytest.approx(-0.2), 0.5)
    assert found["last_quarter"] == {"payload": pytest.approx((-0.6 - 0.2) / 2), "detector": pytest.approx(0.95)}
    assert len(found["curve"]) == 8


def test_each_caption_has_its_own_change(guards: ModuleType, tmp_path: Path):
    sizes = {
        "000000": {"a star": (1.69, 1.49), "a circle": (1.19,)},
        "000768": {"a star": (1.19, 1.09), "a circle": (1.09,)},
    }
    for evaluation, captions in sizes.items():
        folder = tmp_path / "evaluation" / evaluation
        folder.mkdir(parents=True)
        rows = [
            {"prompt": caption, "scores": {"eval/jpeg_compressibility": -size, "eval/shapes_alignment": size / 2}}
            for caption, of_caption in captions.items()
            for size in of_caption
        ]
        (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = guards.by_caption(tmp_path)
    assert found["a star"]["payload"] == pytest.approx(0.45 / 0.9 - 1)
    assert found["a circle"]["payload"] == pytest.approx(0.4 / 0.5 - 1)
    assert (found["a star"]["detector_before"], found["a star"]["detector_after"]) == pytest.approx((0.795, 0.57))


def test_longer_runs_take_smaller_steps(guards: ModuleType):
    for count, rate, every in ((192, "5e-05", "6"), (960, "1e-05", "30")):
        overrides = guards.held_arm(count).overrides
        of = dict(zip(overrides[::2], overrides[1::2], strict=True))
        assert (of["optimizer.lr"], of["evaluation.every"]) == (rate, every)


def test_combine_measures_the_gain_of_both_rewards_in_any_unit(guards: ModuleType):
    def run(scale: float, gain: float) -> list[dict[str, Any]]:
        sizes = [-scale * (BLANK_KB + 1), -scale * (BLANK_KB + 1 - gain)]
        rows = [
            {"eval/size/mean": size, "eval/shapes_alignment/mean": detector}
            for size, detector in zip(sizes, (0.5, 0.6), strict=True)
        ]
        pull = {"advantage/shapes_alignment/correlation": 0.3, "gradient/size/shapes_alignment/cosine": -0.1}
        return [rows[0], pull, rows[1]]

    arms = {f"sum, scale {scale}": [run(scale, 0.1), run(scale, 0.3)] for scale in (1, 100)}
    found = guards.combine(arms)["arms"]
    for arm in arms:
        assert found[arm]["payload"] == {"mean": pytest.approx(-0.2), "standard_error": pytest.approx(0.1)}
        assert found[arm]["detector"]["mean"] == pytest.approx(0.2)
        assert (found[arm]["correlation_of_alignment"], found[arm]["cosine"]) == (0.3, pytest.approx(-0.1))
        assert found[arm]["num_seeds"] == 2
