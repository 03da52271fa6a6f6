"""Checkpoints of format 1, which are pickles: read if the user trusts them, and then bitwise as before."""

from __future__ import annotations

from pathlib import Path

import pytest
from old_checkpoints import save_old, write_old_state
from saved_engines import ENGINES, assert_equal_weights, build, update

from rlcm_fast.run_folder.checkpoint import check_format, damage, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_process")
QUICK = ("stage_0", "stage_3", "8bit_1", "pure_bf16")
NAMES = [  # format 1 never had sums in float32
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in ENGINES
    if name != "bf16_sums_in_fp32"
]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_goes_on_bitwise_if_it_is_trusted(name: str, tmp_path: Path):
    engine, other = build(0, **ENGINES[name]), build(9, **ENGINES[name])
    update(engine, 2)
    save_old(engine, tmp_path)
    write_old_state(tmp_path, {"iteration": 2})
    assert load_checkpoint(tmp_path, other, trusts_old=True)["iteration"] == 2
    assert_equal_weights(other, engine)
    assert other.lr == engine.lr
    update(engine, 2)
    update(other, 2)
    assert_equal_weights(other, engine)


def test_without_trust_nothing_of_it_is_read(tmp_path: Path):
    save_old(build(0, stage=1), tmp_path)
    write_old_state(tmp_path, {})
    said = "is of an older version, whose checkpoints are pickles: .* runs any code .* set trust_old_checkpoint=true"
    with pytest.raises(ValueError, match=said):
        check_format(tmp_path, trusts_old=False)
    for name in ("stage_0", "pure_bf16"):
        with pytest.raises(ValueError, match=said):
            build(0, **ENGINES[name]).load(tmp_path)


@pytest.mark.parametrize("name", ["stage_0", "stage_1", "pure_bf16"])
def test_damage_of_an_old_one_is_found_without_reading_it(name: str, tmp_path: Path):
    save_old(build(0, **ENGINES[name]), tmp_path)
    write_old_state(tmp_path, {})
    assert damage(tmp_path) is None
    file = sorted(tmp_path.rglob("*.pt"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert damage(tmp_path) == f"{file.relative_to(tmp_path)} is truncated"
    for file in tmp_path.rglob("*.pt"):
        file.unlink()
    assert damage(tmp_path) == "it has neither engine.pt nor files in deepspeed/"
