"""What a guard, checkpoint.best and rewards_combine ask of the rest of the config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlcm_fast.config import parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.config.guard_checks import held_out_names

TWO = "--rewards=[{name: jpeg_compressibility}, {name: shapes_alignment}]"
TASKS = (
    "--tasks=[{name: small, source: 'shapes:one', rewards: [{name: jpeg_compressibility}]},"
    " {name: there, source: 'shapes:one', rewards: [{name: shapes_alignment}]}]"
)
PACK = "[{name: jpeg_compressibility, arguments: {quality: 50}, label: low}, {name: jpeg_compressibility}]"


def options(text: str) -> list[str]:
    return [item if item.startswith("--") else f"--{item}" for item in text.split("|")]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("guard.action=warn|guard.watch=[taste]", r"guard.watch=taste is not measured; give one of all, held_out, .*"),
        ("guard.action=warn|guard.floors={taste: 1}", "guard.floors=taste is not measured"),
        ("guard.action=warn|guard.floors={saturation: -1}", "guard.floors.saturation=-1 is no half-width"),
        ("guard.action=warn|guard.watch=[]", r"guard.watch=\[\] leaves nothing"),
        ("guard.action=warn|guard.watch=[kl_to_start]", "names kl_to_start, which needs the start model"),
        ("guard.action=raise_kl|guard.acts_on=[kl_to_start]", "which has no band with guard.max_kl=0"),
        ("guard.action=warn|evaluation.every=0", "guard.action=warn never measures with guard.every=0"),
        ("guard.action=stop", "checkpoint.best is empty, so none better are kept"),
        (f"guard.action=raise_kl|{TWO}", "acts on held-out rewards, and the run evaluates only what it trains on"),
        ("guard.watch=[taste]", "guard.watch=taste is not measured"),  # a guard that is off, too
        ("guard.floors={saturation: -1}", "guard.floors.saturation=-1 is no half-width"),
        ("guard.action=warn|guard.floors={held_out: 0.5}", "guard.floors.held_out=0.5 is guard.floor"),
        ("guard.action=warn|guard.floors={all: 3}", "guard.floors.all=3 names no measure; name one"),
        ("guard.action=warn|guard.floors={kl_to_start: .5}", "kl_to_start=0.5 has no half-width; set guard.max_kl"),
        (
            "guard.action=warn|guard.watch=[held_out]|guard.floors={saturation: 0.6}",
            "guard.floors.saturation=0.6 has no use, as guard.watch does not name saturation",
        ),
        (
            "guard.action=raise_kl|guard.watch=[held_out]|guard.max_kl=0.1",
            "guard.max_kl=0.1 has no use, as guard.watch does not name kl_to_start",
        ),
        (
            "guard.action=warn|guard.max_kl=0.1",
            "guard.max_kl=0.1 is the upper end of kl_to_start, which needs the start",
        ),
        (
            f"guard.action=stop|guard.acts_on=[held_out, held_out]|{TWO}|checkpoint.best=eval/diversity",
            "acts on held-out rewards, and the run evaluates only what it trains on",
        ),
        (
            f"guard.action=warn|guard.watch=[held_out]|{TWO}",
            r"guard.watch=\[held_out\] has no band: the run evaluates only",
        ),
        (
            f"guard.action=warn|guard.watch=[kl_to_start]|update.kl_weight=0.1|{TWO}",
            r"guard.watch=\[kl_to_start\] has no band",
        ),
        *[
            (
                f"guard.action=warn|evaluation.rewards=[{{name: jpeg_incompressibility, label: {name}}}]",
                f"evaluation.rewards has a reward called {name}, which guard.action=warn calls something else; give",
            )
            for name in ("saturation", "jpeg_kb", "diversity_across", "distance_to_start", "kl_to_start", "all")
        ],
        ("guard.action=warn|evaluation.rewards=[{name: a:B, label: held_out}]", "has a reward called held_out, which"),
        ("guard.action=warn|evaluation.rewards=[{name: a:B, label: outside}]", "has a reward called outside, which"),
        ("guard.z=0", "guard.z=0.0 is out of range"),
        ("checkpoint.best=eval/taste/mean", r"checkpoint.best=eval/taste/mean is no metric .* eval/diversity"),
        ("checkpoint.best=min:shapes_alignment", "is no metric of this run's evaluation"),
        ("rewards=[{name: human}]|advantages.kind=group|checkpoint.best=eval/human/mean", "human/mean is no metric of"),
        ("checkpoint.best=eval/diversity|evaluation.every=0", "checkpoint.best=eval/diversity is never measured"),
        ("checkpoint.export=best", "checkpoint.export=best has no best checkpoint"),
        ("rewards_combine=lexicographic", "has one reward and so no order"),
        (f"rewards_combine=lexicographic|{TWO}", r"rewards\[0\].threshold of jpeg_compressibility is missing"),
        ("rewards=[{name: jpeg_compressibility, threshold: 1}]", "threshold=1 .* has no use with rewards_combine=sum"),
        (
            f"rewards_combine=normalised|advantages.kind=group|advantages.scale=none|{TWO}",
            "rewards_combine=normalised standardises each reward, and advantages.scale=none",
        ),
        ("rewards=[{name: a:B}, {name: a:B}]", r"rewards\[1\].name=a:B is already in rewards; drop one, or give each"),
        ("rewards=[{name: a:B, label: c}, {name: c:D, label: c}]", r"rewards\[1\].label=c is already in rewards"),
        ("rewards=[{name: a:B, label: b/c}]", "label='b/c' is no label"),
        ("rewards=[{name: a:B, label: total}]", "label='total' is no label"),
        (f"evaluation.rewards={PACK}", "name=jpeg_compressibility is already in rewards"),
        (
            "rewards=[{name: a:B, label: c}]|evaluation.rewards=[{name: a:B, label: c}]",
            r"evaluation.rewards\[0\].label=c is already in rewards",
        ),
        (
            f"{TASKS[:-3]}, {{name: a:B, label: c}}]}}]|evaluation.rewards=[{{name: d:E, label: c}}]",
            r"evaluation.rewards\[0\] and tasks\[1\].rewards\[1\] are both called c, one is d:E and the other a:B",
        ),
    ],
)
def test_what_cannot_work_is_one_line(text: str, problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        validate(parse_config(options(text)), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "guard.action=warn",
        "guard.action=raise_kl|guard.acts_on=[held_out, kl_to_start]|guard.max_kl=0.1|guard.every=3|evaluation.every=0",
        f"guard.action=raise_kl|guard.acts_on=[diversity_across]|{TWO}",
        "guard.action=stop|checkpoint.best=eval/shapes_alignment/mean|checkpoint.export=best",
        "guard.action=warn|guard.max_kl=0.1|update.kl_weight=0.05",
        "guard.action=warn|guard.floors={saturation: 0.6, shapes_alignment: 0.1}|guard.watch=[held_out, saturation]",
        "guard.action=off|guard.every=5",  # switches off a file's guard
        "evaluation.rewards=[{name: jpeg_incompressibility, label: saturation}]",
        "checkpoint.best=min:eval/jpeg_compressibility/mean",
        f"checkpoint.best=eval/small/shapes_alignment/mean|{TASKS}",
        f"guard.action=warn|guard.watch=[small/shapes_alignment]|{TASKS}",
        f"rewards={PACK}|rewards_combine=normalised",
        "rewards_combine=lexicographic|rewards=[{name: shapes_alignment, threshold: 0.5}, {name: diversity}]",
    ],
)
def test_what_can_work_is_accepted(text: str):
    validate(parse_config(options(text)), 1)


def test_held_out_is_what_a_task_evaluates_and_does_not_train():
    config = parse_config(["--evaluation.rewards=[{name: diversity, label: spread}]"])
    assert held_out_names(validate(config, 1)) == ["shapes_alignment", "spread"]
    run = validate(parse_config([TASKS]), 1)
    assert held_out_names(run) == ["small/shapes_alignment"]
    watched = parse_config([TASKS, "--evaluation.rewards=[{name: shapes_alignment}]"])
    assert held_out_names(validate(watched, 1)) == ["small/shapes_alignment"]


def test_a_task_combines_as_the_run_does_or_in_its_own_way():
    config = parse_config([TASKS, "--rewards_combine=normalised"])
    first = replace(config.tasks[0], rewards_combine="sum")
    run = validate(replace(config, tasks=[first, config.tasks[1]]), 1)
    assert [(task.rewards_combine, task.combine_field) for task in run.tasks] == [
        ("sum", "tasks[0].rewards_combine"),
        ("normalised", "rewards_combine"),
    ]


def test_a_guard_that_may_raise_the_weight_needs_the_start_model_as_a_kl_term_does():
    from rlcm_fast.planner.estimate import strategy_of

    off, raises, term = (
        parse_config(options(text)) for text in ("guard.action=warn", "guard.action=raise_kl", "update.kl_weight=0.1")
    )
    assert [config.has_start_model for config in (off, raises, term)] == [False, True, True]
    assert [strategy_of(config).start_model for config in (off, raises, term)] == ["off", "copy", "copy"]
