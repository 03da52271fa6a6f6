"""The page: complete in one file, everything escaped, several runs with their seeds averaged; a browser reads it in
test_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from report_runs import PROMPTS, make_run, png

from rlcm_fast.cli.main import main
from rlcm_fast.report import read_run, read_runs, render
from rlcm_fast.report.charts import averaged, sections_of_groups, sections_of_run, smoothed
from rlcm_fast.report.drawing import Point, Series, draw, thinned
from rlcm_fast.report.groups import group, results
from rlcm_fast.report.pictures import disputes, extremes, load, pairs, ranks_by, varied
from rlcm_fast.report.settings import settings

EVIL = "<script>alert(1)</script>\"'&{{7*7}}"


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts = {"script": "", "style": ""}
        self.inside = ""  # the element whose text comes next
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in self.texts:
            self.texts[self.inside] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run_0")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return render([read_run(run_dir)])


def test_nothing_in_the_page_loads_anything(page: str):
    elements = Elements(page)
    sources = [a.get("src") or a.get("href") or a.get("xlink:href") or "" for _, a in elements.tags]
    assert all(source[:5] in ("", "data:") or source[0] == "#" for source in sources)
    assert "url(http" not in page and "@import" not in page
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= namespaces


def test_the_policy_allows_the_page_s_own_script_and_style_and_no_others(page: str):
    elements = Elements(page)
    policy = next(m["content"] for m in elements.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:")
    for tag in ("script", "style"):
        digest = hashlib.sha256(elements.texts[tag].encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "script-src 'sha256-" in policy and "unsafe-inline'" not in policy.partition("style-src-attr")[0]


@pytest.mark.usefixtures("no_charts")
def test_prompts_names_and_settings_are_text(tmp_path: Path):
    run_dir = make_run(tmp_path / "<img src=x onerror=alert(1)>", prompts=[EVIL])
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("name: jpeg_compressibility", "name: '<b>bold</b>'"))
    metrics = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(metrics.replace("/jpeg/", "/<i>jpeg</i>&amp;/"))
    for runs in ([read_run(run_dir)], read_runs([run_dir, make_run(tmp_path / "other")])):
        page = render(runs)
        elements = Elements(page)
        assert len(elements.all("script")) == 1
        assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
        assert not elements.all("i") and "<b>bold" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{7*7}}" in page
        assert all("://" not in (image["src"] or "") for image in elements.all("img"))


def test_it_can_be_read_without_seeing_it(page: str):
    elements = Elements(page)
    assert all(image.get("alt") for image in elements.all("img"))
    charts = [svg for svg in elements.all("svg") if svg.get("role") == "img"]
    assert charts and all(svg.get("aria-label") for svg in charts)
    assert all(svg.get("role") == "img" or svg.get("aria-hidden") == "true" for svg in elements.all("svg"))
    assert len(elements.all("table")) >= len(charts), "the numbers behind every chart"
    (slider,) = elements.all("input")
    assert {"for": slider["id"]} in elements.all("label")
    assert elements.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_headings_leave_no_level_out(page: str):
    levels = [int(tag[1]) for tag, _ in Elements(page).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_charts_take_their_colours_from_the_page(page: str):
    assert "var(--series-0)" in page and "#10a0" not in page and "#10b0" not in page
    assert page.count("<style") == 1  # matplotlib's would hold for the whole page


def test_the_pictures_of_the_guard_are_shown(page: str):
    (shown,) = [image for image in Elements(page).all("img") if "alarmed the guard, after 5" in (image["alt"] or "")]
    assert shown["src"] == f"data:image/png;base64,{base64.b64encode(png((200, 90, 90), (200, 60))).decode()}"


def test_chosen_images(run_dir: Path):
    run = read_run(run_dir)
    last = run.evaluations[-1]
    assert [pair.before.prompt for pair in pairs(run)][:3] == list(PROMPTS)  # each prompt first
    assert pairs(run)[0].rows[0] == ("jpeg", pytest.approx(-2.0), pytest.approx(-1.0))
    by_jpeg, by_shown = extremes(last)
    assert by_jpeg.best[0].scores["jpeg"] == pytest.approx(-0.89)
    assert by_shown.best[0].scores["shown"] == pytest.approx(0.4)
    first = disputes(last)[0]  # the rewards rank in opposite orders
    assert {first.liked_rank, first.disliked_rank} == {1, 12}


def test_equal_scores_share_a_rank_and_a_constant_reward_has_none(run_dir: Path):
    last = read_run(run_dir).evaluations[-1]
    for image, score in zip(last.images, (1, 1, 1, 0, 2, *[0] * 7), strict=True):
        image.scores["tied"] = score  # pyright: ignore[reportIndexIssue]
        image.scores["same"] = 3.0  # pyright: ignore[reportIndexIssue]
    assert [ranks_by(last, "tied")[number] for number in (4, 0, 1, 2, 3)] == [1, 3, 3, 3, 8]
    assert ranks_by(last, "same") == {}
    assert [found.reward for found in extremes(last)] == ["jpeg", "shown", "tied"]
    assert len(varied(last.images, 5)) == 5


def test_large_files_are_made_smaller_and_small_ones_stay_as_they_are(tmp_path: Path):
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (900, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    (tmp_path / "small.png").write_bytes(png((1, 2, 3), (64, 48)))
    large, small = load(tmp_path / "large.png", "noise"), load(tmp_path / "small.png", "plain")
    assert large and small
    assert large.source.startswith("data:image/jpeg") and (large.width, large.height) == (1024, 614)
    assert base64.b64decode(small.source.partition(",")[2]) == (tmp_path / "small.png").read_bytes()
    assert small.shown_width == 192 and large.shown_width == 1024


def test_a_comparison_has_the_sections_of_a_single_run(tmp_path: Path):
    runs = []
    for seed in (0, 1):
        more = {f"gradient/{name}/norm": 1.0 + seed for name in ("jpeg", "other")} | {"advantage/jpeg/abs_mean": 0.5}
        more |= {"guard/shown": 0.5 + seed, "guard/shown/low": 0.4, "guard/outside": float(seed), "grad_norm": 2.0}
        run_dir = make_run(tmp_path / f"run_{seed}", seed=seed)
        lines = [json.loads(text) | more for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
        (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        runs.append(read_run(run_dir))
    single = {section.title: section.charts for section in sections_of_run(runs[0])}
    several = {section.title: section.charts for section in sections_of_groups([("run", runs)])}
    assert set(single) - set(several) == {"Trained rewards", "Held out: what nobody optimised"}  # one section there

    (shown, outside) = several["Guards"]
    assert (shown.title, outside.title) == ("shown", "Measures outside of their bands")
    assert shown.series[0].points[-1] == Point(80, 1.0, 0.5, 1.5)  # 0.5 and 1.5, a standard error of 0.5
    norms = next(chart for chart in single["Policy"] if chart.title == "Norm of the gradient of each part")
    assert [line.label for line in norms.series] == ["jpeg", "other"]
    titles = {chart.title for chart in several["Policy"]}
    assert {f"Norm of the gradient of each part: {name}" for name in ("jpeg", "other")} < titles
    assert {"Gradient norm", "Mean size of the advantages: jpeg"} < titles


@pytest.mark.usefixtures("no_charts")
def test_seeds_are_averaged_and_settings_set_groups_apart(tmp_path: Path):
    folders = [make_run(tmp_path / f"a_{seed}", seed=seed) for seed in (0, 1)]
    other = make_run(tmp_path / "b", num_iterations=15)
    groups = group(read_runs([*folders, other]))
    assert [(found.label, found.size) for found in groups] == [
        ("a (num_iterations=10)", "2 seeds"),
        ("b (num_iterations=15)", "1 seed"),
    ]
    assert replace(groups[1], runs=[*groups[1].runs, *groups[1].runs]).size == "2 runs of 1 seed"
    table = dict(results(groups))
    assert list(table) == ["eval/jpeg/mean", "eval/shown/mean", "eval/diversity", "images_per_second"]
    first, second = table["eval/jpeg/mean"]
    assert first is not None and second is not None
    assert (first.mean, first.standard_error) == (pytest.approx(-1.0), pytest.approx(0.0))
    assert second.standard_error is None
    page = render(read_runs([*folders, other]))
    assert "2 seeds" in page and "Fields that differ" in page


def test_a_mean_over_seeds_has_its_standard_error_as_band():
    (point,) = averaged([[Point(0, 1.0), Point(1, 5.0)], [Point(0, 3.0)]])
    assert point == Point(0, 2.0, 1.0, 3.0)  # sqrt(2) / sqrt(2)
    assert averaged([[], []]) == []


def test_a_smoothed_curve_of_a_line_is_the_line_inside():
    points = [Point(x, 2.0 * x) for x in range(40)]
    assert [point.y for point in smoothed(points)][2:-2] == [point.y for point in points][2:-2]


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [Point(x, 0.0) for x in range(10_000)]
    kept = thinned(points)
    assert len(kept) == 400 and (kept[0], kept[-1]) == (points[0], points[-1])
    assert len(draw([Series("line", points)], "a line")) < 40_000


def test_ticks_are_whole_iterations_and_a_single_band_is_seen():
    drawn = draw([Series("line", [Point(x, 1.0) for x in (0, 4, 8, 12)])], "a line")
    assert "2.5" not in re.findall(r">([\d.]+)</text>", drawn)
    banded, bare = (draw([Series("line", [point])], "a") for point in (Point(3, 0.7, 0.2, 0.7), Point(3, 0.7)))
    assert "stroke-width: 6" in banded and "stroke-width: 6" not in bare


def test_an_idle_measure_is_named_instead_of_drawn(run_dir: Path, tmp_path: Path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text.replace('"approx_kl": 0.0001', '"approx_kl": 0.0'))
    policy = next(section for section in sections_of_run(read_run(copy)) if section.title == "Policy")
    assert list(policy.zeros) == ["KL to the rollout's policy"]


def test_the_config_is_compared_with_the_file_that_the_command_named(run_dir: Path):
    found = settings(read_run(run_dir))
    assert found.base == "shapes/compressibility_paper"
    rows = {row.name: row for row in found.rows}
    assert rows["num_iterations"].values == ["10", "96", "100"] and rows["num_iterations"].is_changed
    assert rows["policy.last_step"].is_changed  # the config file says renoise


@pytest.mark.usefixtures("no_charts")
def test_the_command_writes_into_the_run_s_folder_and_says_the_verdict(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["report", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("The run has ended after 10 iterations.") and "report.html" in said
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")
    assert not list(run_dir.glob(".report*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["{tmp}/missing"], "is not a folder; give the run_dir"), (["{run}", "--out", "{tmp}/a.pdf"], "ends in .html")],
)
def test_mistakes_are_one_line(run_dir: Path, tmp_path: Path, arguments: list[str], message: str, capsys):
    assert main(["report", *(text.format(tmp=tmp_path, run=run_dir) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
