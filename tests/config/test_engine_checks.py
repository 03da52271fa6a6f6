"""Settings of the engine and the optimizer that do not go together, each refused with the reason and a way out."""

from __future__ import annotations

import pytest

from rlcm_fast.config import parse_config
from rlcm_fast.config.checks import validate

PURE = "--engine.dtype pure_bf16 --optimizer.name adamw_8bit"
BACKWARD = "--engine.optimizer_in_backward true --optimizer.name adamw_8bit --update.micro_batch_size 192"


def mistake(options: str, world_size: int = 1) -> str:
    with pytest.raises(ValueError) as error:
        validate(parse_config(options.split()), world_size)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (f"{PURE} --engine.zero_stage 1", "engine.dtype=pure_bf16 has no master weights for engine.zero_stage=1"),
        ("--engine.dtype pure_bf16", "optimizer.name=adamw would lose updates below the last digit"),
        ("--optimizer.name adamw_8bit --engine.zero_stage 3", "set engine.zero_stage=2, or optimizer.name=adamw"),
        ("--optimizer.name bnb_adamw_8bit --engine.zero_stage 3", "optimizer.name=bnb_adamw_8bit has states of blocks"),
        ("--engine.offload_optimizer true", "is a part of ZeRO; set engine.zero_stage=1 or more"),
        (
            "--engine.offload_optimizer true --engine.zero_stage 2 --optimizer.name adamw_8bit",
            "optimizer.name=adamw_8bit steps on the GPU",
        ),
        (f"{BACKWARD} --engine.zero_stage 1", "leaves engine.zero_stage=1 no gradients to share out"),
        ("--engine.optimizer_in_backward true", "optimizer.name=adamw steps all weights at once"),
        (
            f"{BACKWARD} --update.micro_batch_size 64",
            "its 192 transitions a process do not fit update.micro_batch_size=64; set update.micro_batch_size=192 "
            "(with engine.recompute=block), or update.num_updates=3",
        ),
        ("--engine.compile regional --engine.zero_stage 3", "set engine.compile=off, or engine.zero_stage=2"),
        (f"{BACKWARD} --engine.compile whole", "returns the gradients of all weights at once"),
        (
            "--engine.graphs on",
            "DeepSpeed sets them to None after each step, and its hooks do not run on replay",
        ),
        (f"{PURE} {BACKWARD} --engine.graphs on", "cannot replay the steps of engine.optimizer_in_backward=true"),
        (f"{PURE} --engine.graphs on --engine.offload_idle true", "moves the VAE each time; set engine.graphs=auto"),
        (
            "--engine.channels_last true --optimizer.name bnb_adamw_8bit",
            "makes channels_last weights contiguous at its first step",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: str, message: str):
    assert message in mistake(options)


def test_an_attention_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.config.engine_checks.find_spec", lambda name: None)
    assert "needs the package xformers, which is not installed" in mistake("--engine.attention xformers")


@pytest.mark.parametrize(
    "options",
    [
        PURE,
        BACKWARD,
        f"{PURE} {BACKWARD} --engine.channels_last true --engine.recompute selective",
        "--optimizer.name adamw_8bit --engine.zero_stage 2 --engine.dtype bf16",
        "--optimizer.name bnb_paged_adamw_8bit",
        "--engine.graphs auto --engine.zero_stage 3",
        f"{PURE} --engine.graphs on",
        "--engine.channels_last true --engine.zero_stage 2 --optimizer.name bnb_adamw_8bit",
        "--engine.offload_optimizer true --engine.zero_stage 3 --engine.dtype bf16",
    ],
)
def test_what_goes_together_is_accepted(options: str):
    validate(parse_config(options.split()), 1)
