"""Every parser of ours gets random bytes, texts and JSON: a result, or a ValueError of one line, and nothing else.

By default each parser is tried on a few examples; `python -m pytest -m slow tests/test_fuzz.py` tries thousands.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlcm_fast.backbones import file_kinds, model_files
from rlcm_fast.config import parse_config
from rlcm_fast.engine.shards import FOLDER, read_shards
from rlcm_fast.pairs.checks import check_source
from rlcm_fast.pairs.sources import parse_source
from rlcm_fast.prompts import check_prompts, load_prompts
from rlcm_fast.prompts.files import parse_json_line
from rlcm_fast.rewards.endpoint import BadAnswer
from rlcm_fast.rewards.protocol import Refused, read_answer, read_request
from rlcm_fast.run_folder.checkpoint import check_format, damage
from rlcm_fast.run_folder.sampler_file import read_sampler

FEW = settings(
    max_examples=6,
    deadline=timedelta(seconds=5),
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MANY = settings(FEW, max_examples=2000)

texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40)
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
        assert str(raised) and len(str(raised).splitlines()) == 1, str(raised)


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
