"""Configs by name from any folder, files beside the YAML file that names them, and what a written config means."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlcm_fast.config import Config, parse_config, to_yaml
from rlcm_fast.config.checks import validate
from rlcm_fast.config.files import MayBeFile, find_config, local_path, shipped_configs, summary_of
from rlcm_fast.config.marks import marks_of

ROOT = Path(__file__).resolve().parents[2]
NAMES = [file.relative_to(ROOT / "configs").with_suffix("").as_posix() for file in ROOT.glob("configs/**/*.yaml")]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(path: Path, text: str = "a prompt\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["shapes/compressibility", "shapes/compressibility.yaml"])
@pytest.mark.usefixtures("elsewhere")
def test_a_config_that_ships_is_found_by_name_from_any_folder(name: str):
    assert parse_config(["--config", name]) == parse_config(["--config", str(ROOT / "configs" / f"{name[:22]}.yaml")])


def test_a_path_that_exists_wins_over_a_name(elsewhere: Path):
    write(elsewhere / "shapes" / "compressibility.yaml", "seed: 77\n")
    assert parse_config(["--config", "shapes/compressibility.yaml"]).seed == 77
    write(elsewhere / "shapes" / "compressibility", "seed: 78\n")
    assert parse_config(["--config", "shapes/compressibility"]).seed == 78
    (elsewhere / "shapes" / "joint").mkdir()  # a folder is no config
    assert find_config("shapes/joint") == ROOT / "configs" / "shapes" / "joint.yaml"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("shapes/compresibility", "did you mean shapes/compressibility or shapes/incompressibility? "),
        ("joint", "did you mean large_scale/joint or shapes/joint? "),
        ("configs/rlcm/alignment.yaml", "did you mean rlcm/alignment? "),
        ("runs/mine/config.yaml", ""),
    ],
)
@pytest.mark.usefixtures("elsewhere")
def test_an_unknown_name_is_one_line_with_those_that_are_near(name: str, near: str):
    with pytest.raises(ValueError) as error:
        parse_config(["--config", name])
    assert str(error.value) == (
        f"config={name} is not a file; give the path of a YAML file, or the name of a config that ships: {near}"
        "`rlcm-fast configs` lists them"
    )


def test_every_config_of_the_repository_ships():
    assert sorted(shipped_configs()) == sorted(NAMES)
    assert len(NAMES) > 20
    link = ROOT / "rlcm_fast" / "configs"  # for a checkout that is not installed
    assert link.is_symlink() and link.resolve() == ROOT / "configs"


def test_a_wheel_carries_every_config_and_every_file_beside_them(monkeypatch: pytest.MonkeyPatch):
    from setuptools.dist import Distribution

    described: dict = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **settings: described.update(settings))
    exec(Path("setup.py").read_text(), {"__name__": "setup"})  # noqa: S102
    kept = ("packages", "package_dir", "package_data")
    command = Distribution({key: described[key] for key in kept}).get_command_obj("build_py")
    with contextlib.redirect_stdout(io.StringIO()):
        command.ensure_finalized()
    carried = {Path(folder) / name for _, folder, _, names in command.data_files for name in names}
    assert {file.relative_to(ROOT) for file in ROOT.glob("configs/**/*") if file.is_file()} <= carried
    assert {file.relative_to(ROOT) for file in ROOT.glob("rlcm_fast/planner/**/*.json")} <= carried


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_of_a_config_is_a_sentence_that_says_what_it_is_for(name: str):
    file = shipped_configs()[name]
    first = file.read_text(encoding="ascii").splitlines()[0]
    assert first == f"# {summary_of(file)}"
    assert first.endswith(".") and len(first) <= 110


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("elsewhere")
def test_a_shipped_config_names_files_that_are_found_from_any_folder(name: str):
    run = validate(parse_config(["--config", name]), 8 if "multinode" in name else 1)
    for task in run.tasks:
        for source in (task.source, task.evaluation):
            named = source.startswith(("shapes:", "hf:", "rlcm_fast.prompts.composition:"))
            assert named or Path(source).is_file()
    assert "configs/" not in (ROOT / "configs" / f"{name}.yaml").read_text()


def test_the_fields_that_may_name_a_file_are_marked():
    config = Config()
    marked = {
        f"{type(section).__name__}.{field}"
        for section in (config.model, config.prompts, config.evaluation, config.pretraining, config.tracking)
        for field in marks_of(type(section), MayBeFile)
    }
    assert marked == {"PromptsConfig.source", "EvaluationConfig.prompts", "PretrainingConfig.data"}


NAMED = """
prompts: {source: train.txt}
evaluation: {prompts: ../shared/held_out.jsonl}
pretraining: {data: photos, weight: 1.0}
"""


def test_files_are_taken_from_beside_the_file_that_names_them(elsewhere: Path):
    folder = elsewhere / "conf"
    (folder / "photos").mkdir(parents=True)
    write(folder / "train.txt")
    write(elsewhere / "shared" / "held_out.jsonl")
    write(elsewhere / "train.txt", "another\n")  # the current folder comes second
    write(folder / "my.yaml", NAMED)
    config = parse_config(["--config", "conf/my.yaml"])
    assert config.prompts.source == "conf/train.txt"  # as a user would write it, so that it is good on another machine
    assert config.evaluation.prompts == "shared/held_out.jsonl"
    assert config.pretraining.data == "conf/photos"
    config = parse_config(["--config", str(folder / "my.yaml")])
    assert config.prompts.source == str(folder / "train.txt")


def test_what_is_not_beside_the_file_is_of_the_current_folder(elsewhere: Path):
    write(elsewhere / "train.txt")
    write(elsewhere / "conf" / "my.yaml", NAMED)
    config = parse_config(["--config", "conf/my.yaml"])
    assert (config.prompts.source, config.evaluation.prompts) == ("train.txt", "../shared/held_out.jsonl")


def test_files_of_tasks_are_found_too_and_each_file_looks_beside_itself(elsewhere: Path):
    for folder in ("a", "b"):
        write(elsewhere / folder / "own.txt")
    item = "{name: t, source: own.txt, rewards: [{name: diversity}], evaluation: own.txt}"
    write(elsewhere / "a" / "my.yaml", f"tasks: [{item}]\n")
    write(elsewhere / "b" / "my.yaml", "evaluation: {prompts: own.txt}\n")
    config = parse_config(["--config", "a/my.yaml", "--config", "b/my.yaml"])
    assert (config.tasks[0].source, config.tasks[0].evaluation) == ("a/own.txt", "a/own.txt")
    assert config.evaluation.prompts == "b/own.txt"


def test_the_command_line_means_the_current_folder(elsewhere: Path):
    for folder in (".", "conf"):
        write(elsewhere / folder / "train.txt")
    write(elsewhere / "conf" / "my.yaml", "seed: 1\n")
    item = "{name: t, source: train.txt, rewards: [{name: diversity}]}"
    config = parse_config(["--config", "conf/my.yaml", "--prompts.source", "train.txt", "--tasks", f"[{item}]"])
    assert (config.prompts.source, config.tasks[0].source) == ("train.txt", "train.txt")


@pytest.mark.parametrize("name", ["shapes:one", "hf:data?column=text", "module:function", "~/train.txt"])
def test_a_name_stays_a_name_whatever_lies_beside_the_file(elsewhere: Path, name: str):
    write(elsewhere / "conf" / name)
    write(elsewhere / "conf" / "my.yaml", f"prompts: {{source: '{name}'}}\nevaluation: {{prompts: ''}}\n")
    config = parse_config(["--config", "conf/my.yaml"])
    assert (config.prompts.source, config.evaluation.prompts) == (name, "")


@pytest.mark.parametrize("pattern", ["shards/{000..001}.tar", "shards/*.tar", "shards/000.tar"])
def test_a_pattern_of_shards_is_beside_the_file_where_a_shard_is(elsewhere: Path, pattern: str):
    write(elsewhere / "conf" / "my.yaml", f"pretraining: {{data: '{pattern}'}}\n")
    assert parse_config(["--config", "conf/my.yaml"]).pretraining.data == pattern
    write(elsewhere / "conf" / "shards" / "000.tar")
    assert parse_config(["--config", "conf/my.yaml"]).pretraining.data == f"conf/{pattern}"


@pytest.fixture
def written(elsewhere: Path) -> Callable[[list[str]], Path]:
    """The config.yaml in the folder of a run that was started in `elsewhere`."""

    def write_config(argv: list[str]) -> Path:
        return write(elsewhere / "runs" / "mine" / "config.yaml", to_yaml(parse_config(argv)))

    return write_config


def test_the_config_of_a_run_means_the_same_files_as_the_command_that_started_it(
    elsewhere: Path, written: Callable[[list[str]], Path]
):
    for folder in (".", "conf", "runs/mine", "runs/mine/conf"):  # those of the run's folder must not get in between
        write(elsewhere / folder / "train.txt")
    write(elsewhere / "conf" / "my.yaml", "prompts: {source: train.txt}\n")
    argv = ["--config", "conf/my.yaml", "--evaluation.prompts", "train.txt", "--pretraining.data", "."]
    file = written(argv)
    assert parse_config(["--config", str(file)]) == parse_config(argv)
    assert parse_config(["--config", "runs/mine/config.yaml"]) == parse_config(argv)
    (elsewhere / "printed.yaml").write_text(to_yaml(parse_config(["--config", str(file)])))
    assert parse_config(["--config", "printed.yaml"]) == parse_config(argv)


def test_the_config_of_a_run_is_good_in_a_copy_of_the_folder_that_it_was_started_in(
    elsewhere: Path, written: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch
):
    write(elsewhere / "conf" / "train.txt")
    write(elsewhere / "conf" / "my.yaml", "prompts: {source: train.txt}\n")
    file = written(["--config", "conf/my.yaml"])
    copy = elsewhere / "copy"
    write(copy / "conf" / "train.txt")
    monkeypatch.chdir(copy)
    assert Path(parse_config(["--config", str(file)]).prompts.source).resolve() == copy / "conf" / "train.txt"


def test_the_config_of_a_run_of_a_shipped_config_is_good_in_any_folder(
    elsewhere: Path, written: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch
):
    file = written(["--config", "rlcm/alignment"])
    monkeypatch.chdir(elsewhere / "runs")
    config = parse_config(["--config", str(file)])
    assert Path(config.prompts.source) == ROOT / "configs" / "rlcm" / "activities.txt"
    assert config == parse_config(["--config", "rlcm/alignment"])


def test_a_config_that_an_older_version_wrote_is_read_as_it_was(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    old = yaml.safe_dump({"prompts": {"source": "configs/rlcm/animals.txt"}})
    file = write(elsewhere / "runs" / "old" / "config.yaml", old)
    monkeypatch.chdir(ROOT)
    assert parse_config(["--config", str(file)]).prompts.source == "configs/rlcm/animals.txt"
    assert parse_config(["--config", "configs/rlcm/aesthetic.yaml"]).prompts.source == "configs/rlcm/animals.txt"


def test_the_home_of_an_unknown_user_is_no_error():
    assert local_path("~no_such_user_0/a") == Path("~no_such_user_0/a")
    assert local_path("~/a") == Path.home() / "a"
