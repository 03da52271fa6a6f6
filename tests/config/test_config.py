"""The config: defaults < YAML < command line, and mistakes in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcm_fast.config import Config, RewardConfig, build_parser, parse_config, to_dict, to_yaml
from rlcm_fast.config.checks import validate
from rlcm_fast.config.resolved import resolve

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").glob("**/*.yaml"))


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write_file


def mistake(argv: list[str], world_size: int = 1) -> str:
    with pytest.raises(ValueError) as error:
        validate(parse_config(argv), world_size)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_arguments_give_the_defaults_and_they_are_valid():
    assert parse_config([]) == Config()
    validate(Config(), world_size=1)


def test_the_command_line_overrides_the_file_wherever_it_stands(write):
    file = write("seed: 5\nupdate:\n  clip_range: 2e-4\n  num_passes: 2\n")
    for argv in (["--config", file, "--seed", "7"], ["--seed=7", f"--config={file}"]):
        config = parse_config([*argv, "--policy.num_steps", "8"])
        assert (config.seed, config.update.clip_range, config.update.num_passes) == (7, 2e-4, 2)
        assert config.policy.num_steps == 8
        assert config.optimizer == Config().optimizer


def test_rewards_are_given_as_a_list_in_the_file_or_on_the_command_line(write):
    expected = [RewardConfig("a", 2.0, {"quality": 90}), RewardConfig("b.c:D")]
    text = "[{name: a, weight: 2, arguments: {quality: 90}}, {name: 'b.c:D'}]"
    assert parse_config(["--rewards", text]).rewards == expected
    assert parse_config(["--config", write(f"rewards: {text}\n")]).rewards == expected


def test_switches_need_no_value_and_the_launchers_rank_is_ignored():
    config = parse_config(["--dry_run", "--local_rank=1", "--tracking.wandb", "--seed", "2", "--local-rank", "0"])
    assert config == dataclasses.replace(
        Config(), dry_run=True, seed=2, tracking=dataclasses.replace(Config().tracking, wandb=True)
    )
    assert parse_config(["--dry_run", "false"]) == Config()


@settings(max_examples=25)
@given(
    lr=st.floats(1e-9, 1.0),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    resume=st.none() | st.just("latest"),
    arguments=st.dictionaries(st.text("abc", min_size=1), st.integers() | st.booleans() | st.text("xyz 1e:-#")),
)
def test_the_printed_config_reads_back_equal(tmp_path_factory, lr: float, betas: Any, resume: Any, arguments: Any):
    config = dataclasses.replace(
        Config(),
        optimizer=dataclasses.replace(Config().optimizer, lr=lr, betas=betas),
        rewards=[RewardConfig("a", 0.5, arguments), RewardConfig("b")],
        resume=resume,
    )
    file = tmp_path_factory.mktemp("round") / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse_config(["--config", str(file)]) == config


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configs_are_valid_on_one_and_on_two_processes(file: Path):
    config = parse_config(["--config", str(file)])
    validate(config, world_size=1)
    if any(reward.name == "human" for reward in config.rewards):
        return  # a person rates one process
    size = config.update.micro_batch_size
    halved = dataclasses.replace(config.update, micro_batch_size=size if size == "auto" else size // 2)
    validate(dataclasses.replace(config, update=halved), world_size=2)


def test_help_names_every_field_with_its_meaning():
    text = " ".join(build_parser().format_help().split())
    for section, value in to_dict(Config()).items():
        for name in value if isinstance(value, dict) else [None]:
            assert f"--{section}" + (f".{name} " if name else "") in text
    actions = [action for action in build_parser()._actions if not action.dest.endswith(".help")]
    assert all(action.help for action in actions)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sed", "3"], "--sed is no field of the config; did you mean --seed? --help lists every field"),
        (["--clip_range", "2e-4"], "did you mean --update.clip_range?"),
        (["--policy.num_step=3"], "did you mean --policy.num_steps?"),
        (["--seed", "x"], "seed=x is not allowed; give a whole number"),
        (["--update.clip_range=abc"], "update.clip_range=abc is not allowed; give a number"),
        (["--policy.kind", "dim"], "policy.kind=dim is not allowed; give one of auto, consistency, ddim"),
        (["--engine.zero_stage", "4"], "engine.zero_stage=4 is not allowed; give one of 0, 1, 2, 3"),
        (["--tracking.wandb", "1"], "tracking.wandb=1 is not allowed; give true or false"),
        (["--optimizer.betas", "0.9"], "optimizer.betas=0.9 is not allowed; give a list"),
        (["--seed"], "argument --seed: expected one argument"),
        (["3"], "3 belongs to no option; write --field value"),
        (["--seed", "3", "4"], "4 belongs to no option"),
        (["--config"], "--config needs a YAML file"),
        (["--config", "missing.yaml"], "config=missing.yaml is not a file; give the path of a YAML file"),
        (
            ["--rewards", "jpeg"],
            "rewards=jpeg is not a list; write a list of {name: ..., weight: ..., arguments: ..., gro",
        ),
        (["--rewards", "[{weight: 2}]"], "rewards[0] lacks name; write a list of"),
        (["--rewards", "[{name: a, wait: 2}]"], "rewards[0].wait is no field of the config; did you mean weight?"),
        (["--rewards", "[{name: a, weight: much}]"], "rewards[0].weight=much is not allowed; give a number"),
        (["--rewards", "[{name: a"], "rewards=[{name: a is not YAML"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_field_and_the_way_out(argv: list[str], message: str):
    assert message in mistake(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 3", "sed in config.yaml is no field of the config; did you mean seed?"),
        ("clip_range: 3", "did you mean update.clip_range?"),
        (
            "update: {clip_rang: 3}",
            "update.clip_rang in config.yaml is no field of the config; did you mean clip_range?",
        ),
        ("update.clip_range: 3", "write its section, and the field indented below it"),
        ("policy: {kind: z}", "policy.kind=z is not allowed; give one of auto, consistency, ddim"),
        ("update: 3", "update=3 in config.yaml is a section; indent its fields below it"),
        ("seed:", "seed=None in config.yaml has no value"),
        ("update:\nseed: 1", "update=None in config.yaml has no value"),
        ("rewards: [x]", "rewards[0]=x in config.yaml is not a mapping"),
        ("rewards: {name: x}", "is not a list"),
        ("a: [", "config=config.yaml is not YAML"),
        ("- 1", "config=config.yaml holds no fields"),
        ("", "config=config.yaml holds no fields"),
    ],
)
def test_a_mistake_in_the_file_names_the_file_the_field_and_the_way_out(
    text: str, message: str, write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(write(text)).parent)
    assert message in mistake(["--config", "config.yaml"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--policy.num_steps 1", "policy.num_steps=1 leaves nothing to train: the last step is deterministic"),
        ("--policy.kind ddim --policy.num_steps 1", "policy.num_steps=1 leaves nothing to train"),
        *(
            (f"--policy.kind {kind} --policy.num_steps 51", f"policy.num_steps=51 exceeds the 50 steps of {kind}; give")
            for kind in ("consistency", "tcd")
        ),
        ("--policy.num_steps 1001", "policy.num_steps=1001 is out of range; give at most 1,000: models"),
        (
            "--policy.timesteps [999,499] --policy.num_steps 4",
            "policy.num_steps=4, but policy.timesteps=[999, 499] names 2; leave num_steps out",
        ),
        ("--policy.timesteps [499,999]", "policy.timesteps=[499, 999] must fall from step to step, noisiest first"),
        ("--policy.timesteps [999,499,499]", "must fall from step to step, noisiest first; give [999, 499]"),
        ("--policy.timesteps [1000,499]", "policy.timesteps=[1000, 499] must lie in [0, 999]"),
        ("--policy.timesteps [499,-1]", "policy.timesteps=[499, -1] must lie in [0, 999]"),
        ("--policy.timesteps [999]", "policy.num_steps=1 leaves nothing to train"),
        ("--policy.kind tcd --policy.last_step renoise", "policy.last_step=renoise, but the last step of tcd has"),
        ("--policy.kind euler_ancestral --policy.last_step renoise", "the last step of euler_ancestral has no noise"),
        ("--policy.num_steps 0", "policy.num_steps=0 is out of range; give 1 or more"),
        ("--policy.eta 0", "policy.eta=0.0 is out of range"),
        ("--policy.guidance_scale 0.5", "policy.guidance_scale=0.5 is out of range"),
        ("--prompts.num_prompts 0", "prompts.num_prompts=0 is out of range; give 1 or more"),
        (
            "--prompts.negative blurry --policy.guidance_scale 1",
            "prompts.negative=blurry has no use with policy.guidance_scale=1, which is no guidance; raise it, or set",
        ),
        (
            "--prompts.max_chunks 3",
            "prompts.max_chunks=3 has no use with prompts.long=cut; set prompts.long=chunks, or",
        ),
        ("--prompts.long chunks --prompts.max_chunks 5", "prompts.max_chunks=5 is out of range; give 2, 3 or 4 chunks"),
        ("--prompts.long mask", "prompts.long=mask is not allowed; give one of cut, chunks"),
        ("--model.clip_skip 0", "model.clip_skip=0 is out of range; give 1 or more, or null for none"),
        ("--rewards []", "rewards=[] leaves nothing to optimise"),
        ("--advantages.min_count 17", "advantages.min_count=17 must lie between 2 and advantages.buffer_size=16"),
        ("--advantages.kind group --prompts.images_per_prompt 1", "prompts.images_per_prompt=1 makes no group"),
        ("--update.clip_range 0", "update.clip_range=0.0 is out of range; give a number in (0, 1)"),
        ("--update.kl_weight -1", "update.kl_weight=-1.0 is out of range"),
        (
            "--update.num_updates 7",
            "update.num_updates=7 does not divide the 192 transitions of a pass on each process",
        ),
        (
            "--update.micro_batch_size 50",
            "does not divide the 192 transitions of an update on each process; try 48 or 64",
        ),
        ("--update.micro_batch_size 500", "try 192"),
        ("--optimizer.lr 0", "optimizer.lr=0.0 is out of range"),
        ("--optimizer.lr .inf", "optimizer.lr"),
        ("--optimizer.betas.0 1.0", "optimizer.betas"),
        ("--optimizer.name adam --optimizer.weight_decay 0.1", "set optimizer.name=adamw"),
        ("--rollout.decode_batch_size -1", "rollout.decode_batch_size=-1 is out of range; give 0 or more"),
        ("--engine.offload_idle 2", "engine.offload_idle=2 is not allowed; give true or false"),
        ("--pretraining.weight -1", "pretraining.weight=-1.0 is out of range; give 0 (off) or more"),
        ("--pretraining.weight 0.1", "pretraining.weight=0.1 needs pretraining.data: a folder of captioned images"),
        ("--pretraining.caption_dropout 2", "pretraining.caption_dropout=2.0 is out of range; give a share in [0, 1]"),
        ("--pretraining.batch_size 0", "pretraining.batch_size=0 is out of range; give 1 or more"),
        ("--pretraining.workers -1", "pretraining.workers=-1 is out of range; give 0 or more"),
        (
            "--pretraining.weight 0.1 --pretraining.data shapes:all --pretraining.micro_batch_size 48",
            "pretraining.micro_batch_size=48 does not divide the 64 pairs of an update on each process; try 32 or 64",
        ),
        ("--ema.decay 1", "ema.decay=1.0 is out of range; give a number in [0, 1), as 0.99; 0 is off"),
        ("--ema.decay 0.9 --engine.zero_stage 3", "ema.decay=0.9 needs whole weights on each process; set engine.zero"),
        ("--ema.device gpu", "ema.device=gpu is not allowed; give one of model, cpu"),
        ("--lora.rank -1", "lora.rank=-1 is out of range; give 0 or more"),
        ("--lora.rank 8 --lora.alpha 0", "lora.alpha=0.0 is out of range; give a positive number, as 16"),
        ("--lora.targets []", "lora.targets=[] names no layer; give names of layers, as [to_q, to_v]"),
        ("--lora.targets [to_q,'']", "names no layer"),
        ("--engine.dtype bf16", "engine.dtype=bf16 needs engine.zero_stage >= 1"),
        ("--checkpoint.keep 0", "checkpoint.keep=0 is out of range"),
        ("--seed -1", "seed=-1 is out of range"),
        ("--resume nowhere", "resume=nowhere is no folder; give 'latest' or a folder in runs/default/checkpoints"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_way_out(argv: str, message: str):
    assert message in mistake(argv.split(" "))


def test_adapters_are_float32_and_need_no_stage_for_a_bf16_network():
    argv = ["--engine.dtype", "bf16", "--lora.rank", "8", "--lora.targets", "[to_q, to_out.0]"]
    config = parse_config(argv)
    validate(config, world_size=1)
    assert config.lora.targets == ["to_q", "to_out.0"]


def test_a_reward_is_named_once_and_has_a_weight():
    twice = "[{name: a}, {name: a}]"
    assert "rewards[1].name=a is already in rewards; drop one" in mistake(["--rewards", twice])
    assert "is always evaluated" in mistake(["--evaluation.rewards", "[{name: jpeg_compressibility}]"])
    watched = ["--evaluation.rewards", "[{name: diversity}]", "--evaluation.every", "0"]
    assert "evaluation.rewards=[diversity] are never measured with evaluation.every=0; set" in mistake(watched)
    assert "rewards[0].weight=0.0 of a has no use" in mistake(["--rewards", "[{name: a, weight: 0}]"])


@pytest.mark.parametrize("joined", [True, False])
def test_rewards_on_the_command_line_take_nothing_from_those_of_the_file(write, joined: bool):
    file = write("rewards:\n- {name: a, weight: 3.0, arguments: {quality: 7}}\n- {name: b, arguments: {x: 1}}\n")
    given = "[{name: c}, {name: b, weight: 2}]"
    option = [f"--rewards={given}"] if joined else ["--rewards", given]
    assert parse_config(["--config", file, *option]).rewards == [RewardConfig("c"), RewardConfig("b", 2.0)]
    assert parse_config(["--config", file, "--seed", "3"]).rewards[0] == RewardConfig("a", 3.0, {"quality": 7})


def test_rewards_of_a_second_file_take_nothing_from_those_of_the_first(tmp_path: Path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 5\nrewards:\n- {name: a, weight: 3.0, arguments: {quality: 7}}\n")
    second.write_text("rewards: [{name: b}]\nevaluation: {rewards: [{name: c}]}\n")
    config = parse_config(["--config", str(first), "--config", str(second)])
    assert (config.seed, config.rewards) == (5, [RewardConfig("b")])
    assert config.evaluation.rewards == [RewardConfig("c")]


@pytest.mark.parametrize("number", ["1e-3", "-1E+2", ".5e1", "1.e-4"])
def test_numbers_with_an_exponent_are_numbers_everywhere(write, number: str):
    text = f"[{{name: a, weight: {number}, arguments: {{x: {number}}}}}]"
    expected = [RewardConfig("a", float(number), {"x": float(number)})]
    assert parse_config(["--rewards", text]).rewards == expected
    from_file = parse_config(["--config", write(f"rewards: {text}\nupdate: {{clip_range: {number}}}\n")])
    assert (from_file.rewards, from_file.update.clip_range) == (expected, float(number))


def test_processes_share_prompts_evenly():
    message = mistake(["--prompts.num_prompts", "15", "--update.micro_batch_size", "1"], world_size=2)
    assert message == "prompts.num_prompts=15 does not divide by the 2 processes; try 16"


def test_processes_share_pairs_evenly():
    argv = ["--prompts.num_prompts", "12", "--update.micro_batch_size", "48"]
    argv += ["--pretraining.weight", "0.1", "--pretraining.data", "shapes:all"]
    with pytest.raises(ValueError, match=r"^pretraining.batch_size=64 does not divide by the 3 processes; try 66$"):
        validate(parse_config(argv), world_size=3)


def test_renoise_makes_the_last_step_an_action():
    config = parse_config(["--policy.num_steps", "1", "--policy.last_step", "renoise"])
    assert validate(config, world_size=1).sizes.actions_per_sample == 1
    assert resolve(parse_config(["--policy.num_steps", "4"]), 1).sizes.actions_per_sample == 3
