"""The verdict is computed: directions, standard errors, constants, guards, and how the run ended."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import NUM_IMAGES, make_run

from rlcm_fast.report import read_run, verdict
from rlcm_fast.report.changes import Change, of_held_out, of_training, of_values
from rlcm_fast.report.charts import sections_of_run
from rlcm_fast.report.measures import constants, guards, guards_outside, measures, win_rates
from rlcm_fast.report.reading import RunData
from rlcm_fast.report.rewards import of_person, standard_error


def run_of(lines: list[dict[str, float]], config: dict[str, object] | None = None, **more: object) -> RunData:
    of_config = {"num_iterations": len(lines), "evaluation.num_images": 101, **(config or {})}  # std / sqrt(101 - 1)
    numbered = [{"iteration": float(i), "images_per_second": 1.0, **line} for i, line in enumerate(lines)]
    return RunData(Path(), "run", config=of_config, lines=numbered, **more)  # pyright: ignore[reportArgumentType]


def test_pairs_of_images_give_the_standard_error(tmp_path: Path):
    change = of_held_out(read_run(make_run(tmp_path / "run")), "eval/jpeg")
    assert change is not None
    # every image's score rises by 1, so the pairs have no scatter at all
    assert change.difference == pytest.approx(1.0) and change.standard_error == pytest.approx(0.0, abs=1e-12)
    assert change.word == "rose"


def test_without_images_both_evaluations_scatter():
    change = of_held_out(
        run_of([{"eval/a/mean": 1.0, "eval/a/std": 3.0}, {"eval/a/mean": 2.0, "eval/a/std": 4.0}]), "eval/a"
    )
    assert change is not None
    assert change.standard_error == pytest.approx(math.sqrt(9 / 100 + 16 / 100))
    assert change.sigmas == pytest.approx(2.0) and change.word == "rose"


def test_training_compares_the_ends_by_their_scatter():
    change = of_values([1.0, 3.0, 0.0, 0.0, 5.0, 7.0])
    assert change is not None
    assert (change.start, change.end) == (2.0, 6.0)
    assert change.standard_error == pytest.approx(math.sqrt((2.0 + 2.0) / 2))  # variances of 2, over 2 values each
    assert of_values([1.0]) is None and of_training(run_of([{}]), "reward/a") is None


@pytest.mark.parametrize(
    ("end", "error", "word"),
    [
        (1.0, 0.0, "stayed"),
        (1.5, 0.3, "stayed"),
        (1.5, 0.2, "rose"),
        (0.5, 0.2, "fell"),
        (0.95, None, "stayed"),
        (0.8, None, "fell"),
    ],
)
def test_two_standard_errors_are_a_change_and_a_tenth_where_none_is_known(end: float, error: float | None, word: str):
    assert Change(1.0, end, error).word == word


def test_a_reward_that_rises_while_a_held_out_one_falls_is_said_to_be_bought(tmp_path: Path):
    found = verdict(read_run(make_run(tmp_path / "run")))
    assert found.kind == "mixed"
    assert found.sentences[0] == "The run has ended after 10 iterations."
    assert "Held-out shown fell from 0.9 to 0.4" in found.text
    assert "Held-out diversity of all images stayed at 0.2." in found.text
    assert "The reward may have been bought with the pictures" in found.text


def test_a_run_that_stopped_early_says_so(tmp_path: Path):
    assert verdict(read_run(make_run(tmp_path / "run", is_ended=False))).sentences[0] == (
        "The run stopped early, after 5 of 10 iterations."
    )


def test_a_run_that_a_guard_stopped_says_so_also_while_its_process_ends():
    done = run_of([{"reward/a/mean": 1.0}] * 3, is_alive=True)
    last = {"iteration": 3.0, "guard/stopped": 1.0}
    stopped = replace(done, config={"num_iterations": 9}, lines=[*done.lines, last])
    assert verdict(stopped).sentences[0] == "A guard stopped the run after 3 of 9 iterations."


def test_a_rise_alone_is_good_and_a_fall_is_bad():
    rising = [{"reward/total/mean": float(i), "reward/total/std": 1.0} for i in range(9)]
    assert verdict(run_of(rising)).kind == "good"
    assert verdict(run_of(rising[::-1])).kind == "bad"
    assert verdict(run_of(rising[:1])).kind == "unknown"


def test_a_constant_reward_is_named_with_its_value():
    run = run_of([{"reward/a/mean": 0.25, "reward/a/std": 0.0} for _ in range(3)])
    assert constants(run) == {"a": 0.25}
    assert "The reward a is 0.25 for every image, so it teaches nothing." in verdict(run).text
    assert verdict(run).kind == "bad"
    # one group of a set reward has no deviation either, but another value every time
    assert constants(run_of([{"reward/a/mean": float(i), "reward/a/std": 0.0} for i in range(3)])) == {}


def test_guards_count_where_they_were_last_measured():
    band = {"guard/x/low": 0.0, "guard/x/high": 1.0}
    inside, outside = {"guard/x": 0.5, **band}, {"guard/x": 2.0, **band}
    assert guards_outside(run_of([inside, outside, {}])) == ["x"]
    assert guards_outside(run_of([outside, inside])) == []
    assert guards_outside(run_of([{"guard/outside": 1.0, "guard/kl_weight": 0.1}])) == []


def test_a_held_out_reward_outside_its_band_is_worse_than_a_statistic():
    def kind(**last: float) -> str:
        rising = [{"reward/a/mean": float(i), "reward/a/std": 1.0} for i in range(9)]
        bands = {"guard/b/low": 0.5, "guard/x/low": 0.5, "eval/b/mean": 1.0, "eval/b/std": 1.0}
        start = dict.fromkeys(last, 1.0)
        return verdict(run_of([{**rising[0], **bands, **start}, *rising[1:-1], {**rising[-1], **bands, **last}])).kind

    assert kind(**{"guard/b": 0.8, "guard/x": 0.8}) == "good"
    assert kind(**{"guard/b": 0.8, "guard/x": 0.2}) == "mixed"
    assert kind(**{"guard/b": 0.2, "guard/x": 0.8}) == "bad"
    assert kind(**{"guard/x": 0.2}) == "bad"  # there is nothing else that could tell


def test_a_band_with_one_end_counts_and_is_shaded_to_the_edge_of_its_chart():
    fell = run_of([{"guard/x": 0.8, "guard/x/low": 0.7}, {"guard/x": 0.6, "guard/x/low": 0.7}])
    grew = run_of([{"guard/x": 0.0, "guard/x/high": 1.5}, {"guard/x": 2.0, "guard/x/high": 1.5}])
    assert guards(fell) == guards_outside(fell) == guards(grew) == guards_outside(grew) == ["x"]
    edges = []
    for run in (fell, grew):
        (section,) = (section for section in sections_of_run(run) if section.title == "Guards")
        edges.append([(point.low, point.high) for point in section.charts[0].series[0].points])
    assert edges == [[(0.7, 0.8)] * 2, [(0.0, 1.5)] * 2]


RISING = [{"reward/jpeg/mean": float(i), "reward/jpeg/std": 1.0} for i in range(9)]
HUMAN = {"rewards": [{"name": "human"}]}


def held_out(config: dict[str, object], start: dict[str, float], end: dict[str, float]) -> RunData:
    """Returns a run whose trained reward rises, with one evaluation at either end."""
    return run_of([{**RISING[0], **start}, *RISING[1:-1], {**RISING[-1], **end}], config)


def of_diversity(mean: float, std: float) -> dict[str, float]:
    return {"eval/diversity/mean": mean, "eval/diversity/std": std, "eval/diversity": 0.3}


def test_the_images_of_one_size_have_no_standard_error():
    config, line = {"evaluation.num_images": 64}, {"eval/a/std": 1.0, "eval/a/512x384/std": 1.0}
    assert standard_error(config, line, "eval/a") == pytest.approx(1 / math.sqrt(63))
    assert standard_error(config, line, "eval/a/512x384") is None, "how many of them there are is not known"


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [(0.2449, "good", "stayed near 0.2451; it is 0.2449."), (0.2, "mixed", "fell from 0.2451 to 0.2.")],
)
def test_a_set_reward_of_one_group_has_no_standard_error(end: float, kind: str, said: str):
    watched = {"evaluation.rewards": [{"name": "diversity"}]}
    found = verdict(held_out(watched, of_diversity(0.2451, 0.0), of_diversity(end, 0.0)))
    assert found.kind == kind
    assert f"Held-out diversity {said}" in found.text
    assert "Held-out diversity of all images stayed at 0.3." in found.text, "the measure beside the reward"


def test_the_error_of_a_set_reward_is_that_of_its_groups():
    watched = {"evaluation.num_images": 40, "evaluation.rewards": [{"name": "diversity", "group_size": 8}]}
    run = held_out(watched, of_diversity(0.5, 0.3), of_diversity(0.9, 0.4))
    change = of_held_out(run, "eval/diversity")
    assert change is not None
    assert change.standard_error == pytest.approx(math.hypot(0.3, 0.4) / math.sqrt(5 - 1))  # 40 images / 8
    assert change.word == "stayed" and verdict(run).kind == "good"
    chart = next(c for s in sections_of_run(run) for c in s.charts if c.title == "diversity")
    assert chart.series[0].points[0].low == pytest.approx(0.5 - 2 * 0.3 / 2)


def test_a_mean_counts_the_images_that_have_a_score_and_groups_of_their_own_task():
    task: dict[str, object] = {"name": "t", "rewards": [{"name": "a", "label": "b", "group_size": 10}]}
    config = {"evaluation.num_images": 50, "tasks": [task], "rewards": [{"name": "c"}]}
    line = {f"eval/{key}/std": 6.0 for key in ("t/b", "t/other", "few")} | {"eval/t/other/skipped": 13.0}
    assert standard_error(config, line, "eval/t/b") == 3.0  # of 5 groups
    assert standard_error(config, line, "eval/t/other") == 1.0  # of 37 images
    assert standard_error({}, line, "eval/few") is None
    assert standard_error({"evaluation.num_images": 1}, line, "eval/few") is None


def rated(*rates: tuple[float, float, float], **more: float) -> RunData:
    """Returns a run that a person rates, with its (iteration of the images, win rate, pairs)."""
    human = {"reward/human/mean": -7e-9, "reward/total/mean": -7e-9, "reward/human/std": 0.0, "reward/total/std": 0.0}
    names = ("rating/of_iteration", "rating/win_rate", "rating/compared")
    lines = [{**human, **dict(zip(names, rate, strict=True)), **more} for rate in rates]
    return run_of([human, human, human, *lines], HUMAN)


@pytest.mark.parametrize(
    ("rate", "kind", "said"),
    [
        (0.875, "good", "rose from 0.5 to 0.875 (2.1 standard errors)"),  # 7 of 8: 0.375 / (0.5 / sqrt(8))
        (0.75, "mixed", "stayed near 0.5; it is 0.75 (1.4 standard errors)"),
        (0.0, "bad", "fell from 0.5 to 0"),
    ],
)
def test_a_rated_run_is_judged_by_its_win_rate(rate: float, kind: str, said: str):
    found = verdict(rated((0, 0.5, 2), (2, rate, 3), (2, rate, 8)))
    assert found.kind == kind
    assert f"The win rate against the start model {said}" in found.text
    assert "human" not in found.text and "total" not in found.text and "teaches nothing" not in found.text


def test_a_rated_run_that_nobody_compared_is_not_judged():
    found = verdict(rated())
    assert found.kind == "unknown"
    assert "Nobody has compared its images with the start model's, so there is no win rate." in found.text


def test_beside_a_person_other_rewards_are_goals_of_their_own():
    config: dict[str, object] = {"rewards": [{"name": "human", "label": "taste"}, {"name": "jpeg"}]}
    keys = ("reward/taste/mean", "reward/total/mean")
    run = run_of([{**line, **dict.fromkeys(keys, 0.0)} for line in RISING], config)
    assert [measure.key for measure in measures(run)] == ["jpeg"]
    assert "The reward jpeg rose from" in verdict(run).text
    tasks = [{"name": "a", "rewards": [{"name": "human"}]}, {"name": "b", "rewards": [{"name": "jpeg"}]}]
    assert of_person({"tasks": tasks}) == {"a/human", "a/total"} and of_person({}) == set()


def test_the_win_rate_is_drawn_where_its_images_were_over_the_band_of_no_difference():
    run = rated((0, 0.5, 4), (2, 0.625, 4), (2, 0.75, 16))
    assert [(rate.iteration, rate.rate) for rate in win_rates(run)] == [(0, 0.5), (2, 0.75)]
    (section,) = sections_of_run(run)[:1]
    assert section.title == "Rated by a person"
    points = section.charts[0].series[0].points
    assert [(point.x, point.y, point.low, point.high) for point in points] == [(0, 0.5, 0, 1), (2, 0.75, 0.25, 0.75)]


def test_every_number_of_the_verdict_is_in_the_metrics(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"to {last['eval/shown/mean']:.4g}" in verdict(read_run(run_dir)).text
    assert len(read_run(run_dir).evaluations[0].images) == NUM_IMAGES
