"""What a changed setting means: every field of a config has a rule, and docs/resume.md has them all.

tests/test_changed_settings.py resumes runs with them.
"""

from __future__ import annotations

from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

import pytest

from rlcm_fast.config import Config, LoraConfig, OptimizerConfig, RewardConfig, TaskConfig
from rlcm_fast.run_folder.fingerprint import fingerprint, flat
from rlcm_fast.run_folder.rules import ABSENT, RULES, SILENT, Change, Rule, changes, every_field, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "resume.md"


def between(before: Config, now: Config) -> list[Change]:
    return changes(*(fingerprint(config, SILENT, 1) for config in (before, now)))


def lines(before: Config, now: Config) -> list[str]:
    return [change.line().removeprefix("changed since the checkpoint: ") for change in between(before, now)]


def test_every_field_of_a_config_has_a_rule_and_every_rule_a_field():
    assert {name for name, _ in every_field()} == set(RULES)


def test_the_walk_over_the_fields_finds_what_a_config_has():
    rewards = [RewardConfig("r")]
    config = replace(Config(), rewards=rewards, tasks=[TaskConfig("t", "shapes:one", rewards)])
    found = {name.replace("[r]", "[]").replace("[t]", "[]") for name in flat(config)}
    assert found == {name for name in RULES if not name.startswith("evaluation.rewards")}
    assert dict(every_field())["rewards[].name"] is MISSING


def test_the_page_has_the_table():
    assert table() in PAGE.read_text(encoding="utf-8"), "run: python -m rlcm_fast.run_folder.rules"


def test_equal_configs_have_no_changes_and_silent_fields_are_not_mentioned():
    config = Config()
    assert between(config, config) == []
    assert between(config, replace(config, run_dir="other", debug=True, resume="latest")) == []


def test_a_change_names_field_old_and_new_value():
    now = replace(Config(), optimizer=OptimizerConfig(lr=5e-5))
    assert lines(Config(), now) == ["optimizer.lr 0.0001 -> 5e-05"]


def test_rewards_are_compared_by_name_and_one_that_comes_or_goes_is_one_change():
    a, b = RewardConfig("a"), RewardConfig("b", arguments={"x": 1})
    before, now = (replace(Config(), rewards=rewards) for rewards in ([a, b], [replace(b, weight=2.0), a]))
    emptied = "; the advantage buffers of its task are emptied"
    assert lines(before, now) == [f"rewards[b].weight 1.0 -> 2.0{emptied}"]
    assert lines(before, replace(before, rewards=[a])) == [f"rewards[b] b -> {ABSENT}{emptied}"]
    assert lines(replace(before, rewards=[a]), before) == [f"rewards[b] {ABSENT} -> b{emptied}"]


def test_a_task_that_comes_is_one_change_and_a_reward_within_a_task_another():
    task = TaskConfig("t", "shapes:one", [RewardConfig("a")])
    before = replace(Config(), tasks=[task, replace(task, name="u")])
    more = replace(task, rewards=[RewardConfig("a"), RewardConfig("b")])
    now = replace(before, tasks=[more, *before.tasks[1:], replace(task, name="v")])
    assert [change.field for change in between(before, now)] == ["tasks[t].rewards[b]", "tasks[v]"]


def test_a_field_that_an_older_version_did_not_have_was_at_its_default():
    before, now = (fingerprint(config, SILENT, 1) for config in (Config(), Config(seed=1)))
    for name in ("seed", "rewards[jpeg_compressibility].credit"):
        del before["fields"][name]
    assert [(change.field, change.old, change.new) for change in changes(before, now)] == [("seed", 0, 1)]


def test_a_field_that_this_version_does_not_have_is_mentioned():
    before, now = (fingerprint(Config(), SILENT, 1) for _ in range(2))
    before["fields"]["optimizer.momentum"] = 0.9
    (change,) = changes(before, now)
    assert change.line() == f"changed since the checkpoint: optimizer.momentum 0.9 -> {ABSENT}"


def test_a_refusal_gives_the_reason_and_the_way_out():
    before, now = (replace(Config(), lora=LoraConfig(rank=4, alpha=alpha)) for alpha in (16.0, 64.0))
    (change,) = between(before, now)
    assert change.refusal("runs/a/checkpoints/iteration_000002") == (
        "lora.alpha=64.0 does not go with the checkpoint's 16.0: adapters fit only the layers, the rank and the scale "
        "that they were trained with; keep lora.alpha=16.0, or start a new run from an export of it as model.path, "
        "which has the adapters merged in"
    )
    before, now = (replace(Config(), optimizer=OptimizerConfig(name=name)) for name in ("adamw", "adamw_8bit"))
    (change,) = between(before, now)
    assert change.refusal("C").endswith("start a new run from its weights alone: --resume_weights_only C")


def section(config: Config, section_: str, **values: Any) -> Config:
    return replace(config, **{section_: replace(getattr(config, section_), **values)})


ADAPTERS = section(Config(), "lora", rank=2)
BITS = section(section(Config(), "optimizer", name="adamw_8bit"), "engine", zero_stage=1)


@pytest.mark.parametrize(
    "before, now, is_refused",
    [
        (Config(), section(Config(), "lora", alpha=1.0), False),
        (ADAPTERS, section(ADAPTERS, "lora", alpha=1.0), True),
        (Config(), section(Config(), "optimizer", name="adam"), False),
        (Config(), section(Config(), "engine", zero_stage=3), False),
        (BITS, section(BITS, "engine", zero_stage=0), True),
        (BITS, section(BITS, "engine", zero_stage=2), False),
        (Config(), section(Config(), "ema", decay=0.9), True),
        (section(Config(), "ema", decay=0.9), Config(), False),
    ],
)
def test_what_is_refused_depends_on_both_configs(before: Config, now: Config, is_refused: bool):
    assert [change.rule.kind for change in between(before, now)] == ["refused" if is_refused else "effect"]


@pytest.mark.parametrize("changed, kind", [([], "effect"), (["unet/config.json"], "refused")])
def test_a_model_that_moved_is_refused_unless_its_files_are_the_same(changed: list[str], kind: str):
    now = section(Config(), "model", path="shapes/teacher")
    before, now = (fingerprint(config, SILENT, 1) for config in (Config(), now))
    before["model"] = {"pipeline": {"unet/config.json": {"size": 3, "mtime_ns": 5}}}
    now["model"] = {"pipeline": {"unet/config.json": {"size": 4 if changed else 3, "mtime_ns": 5}}}
    assert [change.rule.kind for change in changes(before, now)] == [kind]


def test_a_rule_is_one_of_four_kinds_and_says_what_it_does():
    for rule in RULES.values():
        assert bool(rule.text) == (rule.kind in ("handled", "refused"))
        assert bool(rule.exception) == (rule.unless is not None)
        assert rule == Rule(rule.kind, rule.text, rule.unless, rule.exception, rule.way_out, rule.voids)
