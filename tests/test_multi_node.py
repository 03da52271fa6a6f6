"""The config for several nodes, and the numbers of docs/multi_node.md."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.memory import communication_table
from rlcm_fast.config import parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.prompts import load_prompts

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "sd15_lcm" / "zero1_multinode.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "communication.csv"
DOCS = (ROOT / "docs" / "multi_node.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32, 64, 128])
def test_the_config_is_good_for_one_to_sixteen_nodes(world_size: int):
    config = parse_config(["--config", str(CONFIG)])
    assert validate(config, world_size).sizes.samples_per_iteration == 256
    assert config.prompts.num_prompts <= len(load_prompts(str(ROOT / config.prompts.source)))


def test_processes_that_do_not_share_the_prompts_evenly_are_refused_as_the_docs_say():
    with pytest.raises(ValueError) as caught:
        validate(parse_config(["--config", str(CONFIG)]), 24)
    assert f"error: {caught.value}" in DOCS


def test_the_table_of_the_docs_is_computed():
    rows = communication_table.table(samples=8, least=0.9)
    with RESULTS.open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]
    assert communication_table.markdown(rows) in DOCS
