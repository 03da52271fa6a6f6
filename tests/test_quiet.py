"""What a run hides of the libraries, what it never hides, and that `--debug true` hides nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlcm_fast import quiet

LEVELS = (
    "TRANSFORMERS_VERBOSITY",
    "DIFFUSERS_VERBOSITY",
    "HF_HUB_VERBOSITY",
    "TORCH_CPP_LOG_LEVEL",
    "KINETO_LOG_LEVEL",
)
LOGGERS = ("bitsandbytes", "DeepSpeed", quiet.MISSING_WEIGHTS)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nothing is hidden yet; afterwards it is as it was."""
    for name in ("RLCM_FAST_DEBUG", *LEVELS):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, list(logger.filters)) for logger in loggers]
    for logger in loggers:  # other tests call the doors
        logger.setLevel("NOTSET")
        logger.filters.clear()
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield
    for logger, (level, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.filters[:] = filters


class Recorder(logging.Handler):
    """Keeps the messages that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def shown(name: str, level: int) -> bool:
    """Whether a record of this logger and level reaches a handler."""
    logger, recorder = logging.getLogger(name), Recorder()
    logger.addHandler(recorder)
    logger.log(level, "message")
    logger.removeHandler(recorder)
    return recorder.messages == ["message"]


def warned(module: str, message: str = "old name", category: type[Warning] = FutureWarning) -> bool:
    """Whether a warning that is attributed to this module would be printed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit(message, category, "file.py", 1, module=module)
    return len(caught) == 1


def test_warnings_and_advice_of_libraries_are_hidden_and_errors_are_not():
    quiet.hush_libraries(debug=False)
    logging.getLogger("DeepSpeed").setLevel("WARNING")  # as importing DeepSpeed does
    for name in ("DeepSpeed", "bitsandbytes", "bitsandbytes.backends.cpu.ops"):
        assert not shown(name, logging.WARNING)
        assert shown(name, logging.ERROR)
    assert not warned("torch.distributed.c10d_logger") and not warned("diffusers.models.lora")
    assert [os.environ[name] for name in LEVELS] == ["error", "error", "error", "ERROR", "99"]
    assert not quiet.is_debug()


def test_our_own_warnings_and_those_of_plug_ins_are_shown():
    quiet.hush_libraries(debug=False)
    assert warned("rlcm_fast.trainer") and warned("my_rewards") and warned("torchlike_rewards")
    assert shown("my_rewards", logging.WARNING)


def test_a_library_that_falls_back_is_heard():
    """As bitsandbytes does with its paged optimizers on a CPU."""
    quiet.hush_libraries(debug=False)
    message = "Paged optimizers are not supported on CPU.\nFalling back to non-paged optimizer behavior."
    assert warned("bitsandbytes.optim.optimizer", message, UserWarning)
    assert not warned("bitsandbytes.optim.optimizer", "MatMul8bitLt: inputs will be cast", UserWarning)


def test_a_level_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    quiet.hush_libraries(debug=False)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_debug_hides_nothing():
    quiet.hush_libraries(debug=True)
    logging.getLogger("DeepSpeed").setLevel("WARNING")
    assert shown("DeepSpeed", logging.WARNING) and shown("bitsandbytes.backends.cpu.ops", logging.WARNING)
    assert warned("torch.distributed.c10d_logger")
    assert not any(name in os.environ for name in LEVELS)
    assert quiet.is_debug()


@pytest.mark.parametrize("debug", ["true", "false"])
def test_the_door_passes_the_field_on(debug: str, capsys: pytest.CaptureFixture[str]):
    from rlcm_fast.train import main

    assert main(["--dry_run", "--debug", debug]) == 0
    assert f"debug: {debug}" in capsys.readouterr().out
    assert quiet.is_debug() == (debug == "true")


def test_a_rewards_model_whose_file_lacks_weights_is_reported(tmp_path: Path):
    """The user's reward would score with random weights, so this warning of transformers must stay."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("q_proj.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    quiet.hush_libraries(debug=False)
    logger, recorder = logging.getLogger(quiet.MISSING_WEIGHTS), Recorder()
    logger.addHandler(recorder)
    CLIPTextModel.from_pretrained(tmp_path)
    logger.removeHandler(recorder)
    assert any("q_proj.weight" in message for message in recorder.messages)


def test_nothing_heavy_is_imported_to_be_quiet():
    code = "import sys, rlcm_fast.quiet; assert not {'torch', 'transformers', 'deepspeed'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent, check=True)
