"""Several tasks and what stands beside them in a config: what would do nothing is refused, with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlcm_fast.config import parse_config, to_yaml
from rlcm_fast.config.checks import validate

ROOT = Path(__file__).resolve().parents[2]
JOINT = ["--config", str(ROOT / "configs" / "shapes" / "joint.yaml")]


def mistake(argv: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        validate(parse_config(argv), world_size=1)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [*JOINT, "--prompts.source", "shapes:two"],
            "prompts.source=shapes:two has no use beside tasks, each of which has its own; move it into a task",
        ),
        ([*JOINT, "--rewards", "[{name: diversity}, {name: a}]"], "rewards=[diversity, a] has no use beside tasks"),
        ([*JOINT, "--evaluation.prompts", "shapes:two"], "evaluation.prompts=shapes:two has no use beside tasks"),
        ([*JOINT, "--advantages.kind", "group"], "advantages.kind=group has no use beside tasks"),
        (["--task_schedule", "by_task"], "task_schedule=by_task has no tasks to take in turn; name tasks, or set task"),
        (
            [*JOINT, "--pretraining.data", "shapes:all"],
            "pretraining.data=shapes:all has no use with pretraining.weight=0; give a weight, as 0.1, or set pretrain",
        ),
    ],
)
def test_what_would_do_nothing_is_refused_with_the_way_out(argv: list[str], message: str):
    assert mistake(argv).startswith(message)


GOOD = "{name: a, source: s, rewards: [{name: r}]}"


@pytest.mark.parametrize("setting", [("--evaluation.prompts", "shapes:two"), ("--advantages.kind", "group")])
def test_a_section_stands_for_tasks_without_a_setting_of_their_own(setting: tuple[str, str]):
    own = "{name: b, source: shapes:one, rewards: [{name: r}], evaluation: shapes:one, advantages: batch}"
    validate(parse_config(["--tasks", f"[{GOOD}, {own}]", *setting]), world_size=1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{name: b, source: s, rewards: [], share: x}", "tasks[1].share=x is not allowed; give a number"),
        (
            "{name: b, source: s, rewards: [], advantages: x}",
            "tasks[1].advantages=x is not allowed; give one of prompt, batch, group, leave_one_out, or leave it out",
        ),
        (
            "{name: b, source: s, rewards: [{name: r}, {name: q, weight: x}]}",
            "tasks[1].rewards[1].weight=x is not allowed; give a number",
        ),
        (
            "{name: b, source: s, rewards: [{name: r, credit: x}]}",
            "tasks[1].rewards[0].credit=x is not allowed; give one of group, leave_one_out",
        ),
    ],
)
def test_a_wrong_type_in_a_task_is_named_with_its_place(task: str, message: str, tmp_path: Path):
    assert mistake(["--tasks", f"[{GOOD}, {task}]"]) == message
    (tmp_path / "tasks.yaml").write_text(f"tasks: [{GOOD}, {task}]\n")
    assert mistake(["--config", str(tmp_path / "tasks.yaml")]) == message


def test_a_date_in_a_list_is_the_text_that_was_written():
    (reward,) = parse_config(["--rewards", "[{name: 2026-11-22, arguments: {since: 2026-11-22}}]"]).rewards
    assert (reward.name, reward.arguments) == ("2026-11-22", {"since": "2026-11-22"})


@pytest.mark.parametrize(
    ("tasks", "watched", "message"),
    [
        (
            "[{name: a, source: 'shapes:one', rewards: [{name: r}, {name: s}]}, "
            "{name: b, source: 'shapes:one', rewards: [{name: s, weight: 2}]}]",
            "{name: s}",
            "evaluation.rewards[0].name=s is already in the rewards of every task, and what is trained is always eval",
        ),
        (
            "[{name: a, source: 'shapes:one', rewards: [{name: r}, {name: s, arguments: {x: 1}}]}, "
            "{name: b, source: 'shapes:one', rewards: [{name: r}]}]",
            "{name: s, arguments: {x: 2}}",
            "evaluation.rewards[0] has arguments={'x': 2} and group_size=0, and tasks[0].rewards[1] of the same name s "
            "arguments={'x': 1} and group_size=0; give it those, or drop it",
        ),
    ],
)
def test_a_watched_reward_that_has_no_key_of_its_own_is_refused(tasks: str, watched: str, message: str):
    argv = ["--tasks", tasks, "--evaluation.rewards", f"[{watched}]", "--update.micro_batch_size", "48"]
    assert mistake(argv).startswith(message)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--rewards", "[]"],
        ["--task_schedule", "by_task", "--update.micro_batch_size", "64"],
        ["--tasks", "[]", "--rewards", "[{name: diversity}]", "--prompts.source", "shapes:two"],
        ["--pretraining.data", "shapes:all", "--pretraining.weight", "0", "--pretraining.data="],
    ],
)
def test_what_has_a_use_is_accepted_and_so_is_the_written_out_config(more: list[str], tmp_path: Path):
    config = parse_config([*JOINT, *more])
    validate(config, world_size=1)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    resolved = parse_config(["--config", str(tmp_path / "config.yaml"), "--resume", "latest"])
    validate(resolved, world_size=1)
    assert resolved.tasks == config.tasks
