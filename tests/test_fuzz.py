"""Every parser of ours gets random bytes, texts and JSON: a result, or a ValueError of one line, and nothing else.

By default each parser is tried on a few examples; `python -m pytest -m slow tests/test_fuzz.py` tries thousands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rlcm_fast.backbones import config_checks, file_kinds, model_files
from rlcm_fast.backbones.assembly import fuse_lora
from rlcm_fast.config import PolicyConfig, parse_config
from rlcm_fast.door import Door
from rlcm_fast.engine.shards import FOLDER, read_shards
from rlcm_fast.pairs.checks import check_source
from rlcm_fast.pairs.sources import parse_source
from rlcm_fast.policies.build import build_schedule
from rlcm_fast.prompts import check_prompts, load_prompts
from rlcm_fast.prompts.files import parse_json_line
from rlcm_fast.rating.records import read_ratings
from rlcm_fast.report import read_run
from rlcm_fast.rewards.endpoint import BadAnswer
from rlcm_fast.rewards.protocol import Refused, read_answer, read_request
from rlcm_fast.run_folder.best import Best
from rlcm_fast.run_folder.checkpoint import check_format, damage
from rlcm_fast.run_folder.lock import _machine, take, token_in
from rlcm_fast.run_folder.sampler_file import read_sampler
from rlcm_fast.run_folder.tracking import _drop_lines_from

FEW = settings(
    max_examples=6,
    deadline=timedelta(seconds=5),
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MANY = settings(FEW, max_examples=2000)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -1, 2**63, 1e308]))
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)


def trees(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """JSON whose objects often have keys that a parser looks for."""
    names = st.one_of(keys, texts)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5))


def objects(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects with most of the keys, and random values."""
    values = trees(st.sampled_from(keys))
    return st.fixed_dictionaries({}, optional=dict.fromkeys(keys, values))


def written(*keys: str) -> st.SearchStrategy[bytes]:
    """Files: random bytes, JSON of the keys, such JSON cut off, and brackets without an end."""
    made = objects(*keys).map(lambda value: json.dumps(value).encode())
    cut = st.tuples(made, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"", b"\xef\xbb\xbf{}", b"\xff\xfe{}"])
    return st.one_of(made, cut, st.binary(max_size=80), deep)


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + b"\0" * 64


def ends_well(call: Callable[[], object], allowed: type[Exception] = ValueError) -> None:
    """Runs a parser; anything but a result or an exception of one line fails the test."""
    raised: Exception | None = None
    try:
        call()
    except allowed as error:
        raised = error
    if raised is not None:
        # A library's subclass (UnicodeDecodeError, JSONDecodeError) has words for programmers.
        assert type(raised) is allowed, repr(raised)
        assert str(raised)
        if isinstance(raised, ValueError):
            assert_printed_in_a_line(raised)


def assert_printed_in_a_line(error: Exception) -> None:
    """A message repeats what was given, and the door prints line breaks and control characters in it as text."""

    def work() -> int:
        raise error

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = Door().lead(work)
    line = said.getvalue()
    assert code == 2 and line.startswith("error: ") and line[:-1].isprintable(), line
    assert "nobody foresaw" not in line, line


def file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def in_file(name: str, parse: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    return lambda content, folder: parse(file(folder, name, content))


PROMPT_KEYS = ("text", "task", "objects", "include", "exclude", "tag", "prompt", "class", "count")
TENSOR_KEYS = ("dtype", "shape", "data_offsets")
UNET_KEYS = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.time_embed.0.weight",
    "a.attn2.to_k.weight",
    "__metadata__",
)
tensor = st.one_of(
    objects(*TENSOR_KEYS),
    st.builds(
        lambda shape, end: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]},
        st.lists(st.integers(-1, 9), max_size=4),
        st.integers(-9, 99),
    ),
)
headers = st.fixed_dictionaries({}, optional=dict.fromkeys(UNET_KEYS, tensor)).map(
    lambda header: json.dumps(header).encode()
)
header_files = st.one_of(headers, written(*UNET_KEYS)).map(safetensors) | st.binary(max_size=60)
INDEX_KEYS = ("unet", "vae", "scheduler", "tokenizer", "_class_name", "weight_map")
REQUEST_KEYS = ("protocol", "reward", "prompts", "tasks", "metadata", "images", "scores", "problems")
SHARD_KEYS = ("parts", "counters", "groups", "shape", "start", "states", "orders", "step", "is_whole")
SAMPLER_KEYS = ("kind", "num_steps", "timesteps", "guidance_scale", "eta", "last_step")
SOURCES = st.one_of(
    texts,
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["hf:", "hf:a/b?", "shapes:", "hf:./x?split=", "a.b:", "os:", "x{0..", "{1..3}"]),
        texts,
        st.sampled_from(["", ".tar", ".jsonl", ".txt", ".JSONL", "}.tar"]),
    ),
)
FIELDS = (
    "seed",
    "model.path",
    "optimizer.lr",
    "rewards",
    "rewards[0].weight",
    "tasks[0].rewards[0]",
    "run_dir",
    "tasks",
)


def tried_with(parse: Callable[[Any], object], allowed: type[Exception]) -> Callable[[Any, Path], object]:
    return lambda value, folder: ends_well(lambda: parse(value), allowed)


options = st.lists(
    st.builds(
        "--{}{}{}".format,
        st.one_of(st.sampled_from(FIELDS), texts),
        st.sampled_from(["=", " ", "", "."]),
        st.one_of(texts, leaves.map(str), trees(st.sampled_from(["name", "weight", "arguments"])).map(json.dumps)),
    ),
    min_size=1,
    max_size=3,
)

LORA_KEYS = (  # the spellings of kohya, PEFT and diffusers, of a layer that is there and of one that is not
    *(f"lora_unet_to_q.{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha")),
    *(f"unet.to_q.{name}" for name in ("lora_A.weight", "lora_B.weight", "lora.down.weight", "hada_w1_a")),
    *(f"lora_unet_no_layer.{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha")),
)
LORA_CONFIG = ("unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora")
patterns = st.dictionaries(st.sampled_from(["to_q", ".*", "(a+)+$", "(", "to_[", "\\"]), leaves, max_size=2)
lora_configs = st.one_of(
    written(*LORA_CONFIG).map(lambda config: config.decode(errors="replace")),
    st.fixed_dictionaries({"unet.alpha_pattern": patterns}).map(json.dumps),
)
matrices = st.one_of(
    st.sampled_from([torch.zeros(2, 4), torch.zeros(4, 2), torch.tensor(2.0)]),
    st.lists(st.integers(0, 3), max_size=4).map(torch.zeros),
)
lora_files = st.tuples(st.dictionaries(st.sampled_from(LORA_KEYS), matrices, min_size=1, max_size=4), lora_configs)


class Unet(torch.nn.Module):
    """A layer that a LoRA may name."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"down_block_types": [], "up_block_types": [], "layers_per_block": 1}
        self.to_q = torch.nn.Linear(4, 4)


def read_and_add(drawn: tuple[dict[str, torch.Tensor], str], folder: Path) -> None:
    """Reads a LoRA and adds it to a layer, where a pipeline does so."""
    tensors, config = drawn
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        folder / "lora.safetensors",
        {"lora_adapter_metadata": config},
    )
    pipeline = SimpleNamespace(components={"unet": Unet()})
    fuse_lora(pipeline, str(folder / "lora.safetensors"), "model.lora=lora.safetensors")


CONFIG_KEYS = {
    "unet": ("in_channels", "out_channels", "sample_size", "class_embed_type", "time_cond_proj_dim", "_class_name"),
    "vae": ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "in_channels"),
    "text_encoder": ("hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size"),
    "tokenizer": ("model_max_length", "padding_side", "truncation_side"),
    "scheduler": ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "trained_betas"),
}
part_configs = st.fixed_dictionaries({part: objects(*keys) for part, keys in CONFIG_KEYS.items()})


def check_parts(drawn: dict[str, dict[str, Any]], folder: Path) -> None:
    """Checks the configs of a model's parts, each for itself."""
    parts = {name: config_checks.PartConfig("it", f"{name}/config.json", config) for name, config in drawn.items()}
    checks: list[Callable[[], object]] = [
        lambda: config_checks.check_class(parts["unet"], (config_checks.UNET,)),
        lambda: config_checks.check_unet(parts["unet"], has_own_size=False),
        lambda: config_checks.check_vae(parts["vae"], 4, is_sdxl=True),
        lambda: config_checks.check_text_encoder(parts["text_encoder"]),
        lambda: config_checks.check_tokenizer(parts["tokenizer"], parts["text_encoder"]),
        lambda: build_schedule(PolicyConfig(kind="ddim"), drawn["unet"], drawn["scheduler"]),
    ]
    for check in checks:
        ends_well(check)


RATING_KEYS = ("id", "round", "kind", "prompt", "images", "ranks", "seconds", "time", "undone")
SCORE_KEYS = ("iteration", "image", "prompt", "scores", "file", "reward/a/mean", "seconds/iteration", "eval/a/mean")
LOCK_KEYS = ("pid", "host", "process_start", "token", "since")


def of_a_run(content: bytes, folder: Path) -> None:
    """Reads a run's folder all of whose files hold the content; forgets it after."""
    for name in ("metrics.jsonl", "config.yaml", "environment.json", "evaluation/000001/scores.jsonl", "grids/1.png"):
        file(folder, f"run/{name}", content)
    read_run(folder / "run")
    _drop_lines_from(folder / "run" / "metrics.jsonl", 3)


def with_this_machine(content: bytes) -> bytes:
    """Puts this machine into what is a JSON object, so that its process is looked for."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return json.dumps(found | _machine()).encode() if isinstance(found, dict) else content


def lock_in(content: bytes, folder: Path) -> None:
    """Takes a run's folder whose lock holds the content; it was last touched long ago."""
    os.utime(file(folder, "run/lock", content), (0, 0))
    token_in(folder / "run")
    take(folder / "run", lambda line: None).release()


PARSERS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], object]]] = {
    "a line of prompts": (
        st.one_of(texts, objects(*PROMPT_KEYS).map(json.dumps), st.just("[" * 100_000), st.just("1" * 10_000)),
        lambda line, folder: parse_json_line(line),
    ),
    "prompts.jsonl": (written(*PROMPT_KEYS), in_file("a.jsonl", lambda path: load_prompts(str(path)))),
    "prompts.TXT": (written("a"), in_file("a.TXT", lambda path: load_prompts(str(path)))),
    "a source of prompts": (SOURCES, lambda source, folder: check_prompts(source)),
    "a source of pairs": (SOURCES, lambda source, folder: parse_source(source)),
    "pairs.jsonl": (written("image", "text"), in_file("a.jsonl", lambda path: check_source(str(path)))),
    "a single file's header": (
        header_files,
        in_file("a.safetensors", lambda path: file_kinds.kind_of(path, "model.path=a.safetensors")),
    ),
    "a network's header": (header_files, in_file("a.safetensors", lambda path: model_files.check_whole(path, "it"))),
    "model_index.json": (
        written(*INDEX_KEYS),
        in_file("model_index.json", lambda path: model_files.parts_of(path.parent, "it")),
    ),
    "the index of a network's shards": (
        written(*INDEX_KEYS),
        in_file("unet/a.safetensors.index.json", lambda path: model_files.check_weights(path.parent, "it", None)),
    ),
    "sampler.json": (written(*SAMPLER_KEYS), in_file("sampler.json", lambda path: read_sampler(str(path.parent)))),
    "state.json": (
        written("format", "iteration", "num_processes"),
        in_file("iteration_000001/state.json", lambda path: damage(path.parent) or check_format(path.parent, False)),
    ),
    "a shard's index": (
        written(*SHARD_KEYS),
        in_file(f"{FOLDER}/shard_00000_of_00001.json", lambda path: read_shards(path.parent.parent)),
    ),
    "a request": (written(*REQUEST_KEYS), tried_with(lambda data: read_request(data, "it"), Refused)),
    "an answer": (trees(st.sampled_from(REQUEST_KEYS)), tried_with(lambda answer: read_answer(answer, 2), BadAnswer)),
    "a LoRA": (lora_files, read_and_add),
    "configs of a model's parts": (part_configs, check_parts),
    "ratings.jsonl": (written(*RATING_KEYS), in_file("ratings.jsonl", read_ratings)),
    "a run's folder": (written(*SCORE_KEYS), of_a_run),
    "the lock of a run": (written(*LOCK_KEYS).map(with_this_machine), lock_in),
    "the best checkpoint of a run": (
        written("checkpoint", "iteration", "metric", "value"),
        in_file("checkpoints/best.json", lambda path: Best.find(path.parent.parent)),
    ),
    "options": (options, lambda argv, folder: parse_config([part for option in argv for part in option.split(" ", 1)])),
    "a config": (
        st.one_of(written("seed", "model", "rewards", "tasks", "name"), texts.map(str.encode)),
        in_file("a.yaml", lambda path: parse_config(["--config", str(path)])),
    ),
}


# These take longest.
OF_CONFIGS = ("options", "a config")


def tries(name: str, folder: Path, profile: settings) -> None:
    values, parse = PARSERS[name]

    @profile
    @given(values)
    def run(value: Any) -> None:
        ends_well(lambda: parse(value, folder))

    run()


@pytest.mark.parametrize("name", [name for name in PARSERS if name not in OF_CONFIGS])
def test_a_parser_ends_in_a_result_or_in_one_line(name: str, tmp_path: Path):
    tries(name, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARSERS if name not in OF_CONFIGS])
def test_a_parser_ends_so_on_thousands_of_inputs(name: str, tmp_path: Path):
    tries(name, tmp_path, MANY)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_CONFIGS)
def test_a_config_ends_in_a_result_or_in_one_line(name: str, tmp_path: Path):
    tries(name, tmp_path, settings(FEW, max_examples=200))


def test_a_yaml_tag_builds_no_object(tmp_path: Path):
    path = file(tmp_path, "a.yaml", b"run_dir: !!python/object/apply:os.mkdir [was_run]\n")
    with pytest.raises(ValueError):
        parse_config(["--config", str(path)])
    assert not (tmp_path / "was_run").exists() and not Path("was_run").exists()
    assert yaml.safe_load("a: 1") == {"a": 1}
