from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from rlcm_fast.prompts import Sampler, Share, StreamSampler, build_sampler, load_prompts, prompts_for_images, stream
from rlcm_fast.trajectory import Prompt

TEXTS = [f"prompt {number}" for number in range(50)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder: Path, values: list, column: str = "text") -> Path:
    """A jsonl folder of two files."""
    folder.mkdir()
    for name, part in (("a", values[: len(values) // 2]), ("b", values[len(values) // 2 :])):
        lines = [json.dumps({column: value, "number": 1}) + "\n" for value in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Fifty prompts in seven windows, the last of them with two."""
    return f"hf:{write(tmp_path / 'many', TEXTS)}?window=8"


def next_texts(sampler: Sampler, num_batches: int) -> list[str]:
    return [prompt.text for _ in range(num_batches) for prompt in sampler.next_batch()]


def test_every_prompt_comes_once_a_pass_and_passes_are_shuffled_differently(source: str):
    order = next_texts(StreamSampler(source, Share(5, 1, seed=0)), 30)
    passes = [order[:50], order[50:100], order[100:]]
    assert all(sorted(texts) == sorted(TEXTS) for texts in passes)
    assert len({tuple(texts) for texts in passes}) == 3


def test_prompts_are_shuffled_within_windows(source: str):
    order = next_texts(StreamSampler(source, Share(4, 1, seed=0)), 4)
    assert sorted(order[:8]) == sorted(TEXTS[:8]) and sorted(order[8:]) == sorted(TEXTS[8:16])
    assert order[:8] != TEXTS[:8] and order[:8] != next_texts(StreamSampler(source, Share(4, 1, seed=1)), 2)
    assert order == next_texts(StreamSampler(source, Share(4, 1, seed=0)), 4)


@pytest.mark.parametrize("num_prompts", [1, 7, 20])
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(source: str, num_prompts: int):
    uninterrupted = StreamSampler(source, Share(num_prompts, 1, seed=3))
    states = []
    order = []
    for _ in range(60 // num_prompts + 3):  # into the second pass and beyond
        states.append(json.dumps(uninterrupted.state_dict()))
        order.append(next_texts(uninterrupted, 1))
    resumed = StreamSampler(source, Share(num_prompts, 1, seed=3))
    for batch, state in reversed([*enumerate(states)]):  # whatever was drawn before loading is forgotten
        resumed.load_state_dict(json.loads(state))
        assert [next_texts(resumed, 1) for _ in order[batch : batch + 10]] == order[batch : batch + 10]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_the_order_of_one_and_may_change_their_number(source: str, world_size: int):
    alone = StreamSampler(source, Share(6, 2, seed=0))
    next_texts(alone, 7)
    ranks = [StreamSampler(source, Share(6 // world_size, 2, 0, rank, world_size)) for rank in range(world_size)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    for _ in range(12):
        assert [prompt for rank in ranks for prompt in rank.next_batch()] == alone.next_batch()
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_an_iteration_may_be_larger_than_a_window_and_as_large_as_the_dataset(source: str):
    assert sorted(next_texts(StreamSampler(source, Share(50, 1, seed=0)), 1)) == sorted(TEXTS)


def test_an_iteration_larger_than_the_dataset_is_refused_with_the_remedy(source: str):
    with pytest.raises(ValueError, match=r"^prompts.source=hf:.* holds 50 prompts, fewer than .*=51 of an iteration"):
        StreamSampler(source, Share(17, 1, seed=0, rank=1, world_size=3)).next_batch()


def test_blank_texts_are_skipped_and_a_window_of_them_too(tmp_path: Path):
    folder = write(tmp_path / "blanks", [*[None, " "] * 4, " a cat ", "", *[""] * 8, "a dog"])
    order = next_texts(StreamSampler(f"hf:{folder}?window=4", Share(1, 1, seed=0)), 6)
    assert order == ["a cat", "a dog"] * 3
    assert load_prompts(f"hf:{folder}?window=4") == [Prompt("a cat")]


def test_a_column_without_texts_is_named(tmp_path: Path):
    empty = f"hf:{write(tmp_path / 'empty', [''] * 9)}?window=4"
    with pytest.raises(ValueError, match=r"^evaluation.prompts=hf:.*holds no prompts: every text .*; name another"):
        load_prompts(empty, "evaluation.prompts")
    with pytest.raises(ValueError, match=r"^prompts.source=hf:.*holds no prompts: every text .*; name another"):
        StreamSampler(empty, Share(1, 1, seed=0)).next_batch()
    with pytest.raises(ValueError, match=r"has 1 in its column number; name a column of texts"):
        StreamSampler(f"{empty}&column=number", Share(1, 1, seed=0))


def test_a_missing_column_is_named_with_those_that_are_there(source: str):
    with pytest.raises(ValueError, match=r"has no column prompt; add \?column= with one of text, number"):
        build_sampler(f"{source}&column=prompt", Share(1, 1, seed=0))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("?splits=train", r"splits is no option; write hf:DATASET\?option=value with options of split, column, name"),
        ("?window=0", "window=0 is no number of examples from 1 on; write it as window=10000"),
        ("?train", r"; write options as \?split=train&column=text"),
        ("?split=test", r"cannot be streamed: Bad split: test. Available splits: \['train'\]; give a folder"),
        ("?name=large", "cannot be streamed: BuilderConfig 'large' not found"),
        ("/missing", r"there is no such folder under .*; give a folder of jsonl, parquet or csv files"),
    ],
)
def test_wrong_options_are_named_with_the_remedy(tmp_path: Path, options: str, problem: str):
    with pytest.raises(ValueError, match=rf"^prompts.source=hf:.*{problem}"):
        load_prompts(f"hf:{write(tmp_path / 'some', TEXTS)}{options}")


def test_an_empty_folder_is_named_with_the_remedy(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^prompts.source=hf:.*cannot be streamed: .*; give a folder of jsonl"):
        load_prompts(f"hf:{tmp_path}")


def test_without_datasets_the_extra_is_named(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^prompts.source=hf:.*not installed: pip install 'rlcm_fast\[data\]'; or"):
        build_sampler(source, Share(1, 1, seed=0))


def test_a_checkpoint_that_counts_its_position_otherwise_is_refused(source: str, monkeypatch: pytest.MonkeyPatch):
    state = StreamSampler(source, Share(2, 1, seed=0)).state_dict()
    monkeypatch.setattr(stream, "_CURSOR", "by pieces")
    with pytest.raises(ValueError, match=r"or by an earlier version of rlcm_fast; resume with those"):
        StreamSampler(source, Share(2, 1, seed=0)).load_state_dict(state)


def test_a_checkpoint_of_another_stream_is_refused(source: str, tmp_path: Path):
    state = StreamSampler(source, Share(2, 1, seed=0)).state_dict()
    other_texts = f"hf:{write(tmp_path / 'other', TEXTS[::-1])}?window=8"
    same = Share(2, 1, seed=0)
    others = [
        (source, Share(3, 1, 0)),
        (source, Share(2, 1, 1)),
        (other_texts, same),
        (source.replace("window=8", "window=9"), same),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"the checkpoint was made with another dataset .*; resume with those"):
            StreamSampler(*other).load_state_dict(state)
    moved = Path(source.removeprefix("hf:").partition("?")[0]).rename(tmp_path / "moved")
    StreamSampler(f"hf:{moved}?window=8", Share(2, 1, 0)).load_state_dict(state)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_folders_of_other_kinds_are_read_and_resumed_too(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "_PARQUET_ROWS", 5)  # which ends where neither a window nor a row group does
    (tmp_path / "table").mkdir()
    for name, texts in (("a", TEXTS[:29]), ("b", TEXTS[29:])):
        path = tmp_path / "table" / f"{name}.{kind}"
        if kind == "csv":
            path.write_text("\n".join(["prompt", *texts]))
        else:
            parquet.write_table(pyarrow.table({"number": range(len(texts)), "prompt": texts}), path, row_group_size=6)
    source = f"hf:{tmp_path / 'table'}?column=prompt&split=train&window=8"
    sampler = build_sampler(source, Share(10, 2, seed=0, task="pets"))
    batches = [prompt for _ in range(5) for prompt in sampler.next_batch()]
    assert sorted(prompt.text for prompt in batches[::2]) == sorted(TEXTS)
    assert batches[::2] == batches[1::2] and {prompt.task for prompt in batches} == {"pets"}
    resumed = build_sampler(source, Share(10, 2, seed=0, task="pets"))
    next_texts(sampler, 2)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert next_texts(resumed, 9) == next_texts(sampler, 9)


def test_of_parquet_the_column_alone_is_read_and_a_row_group_in_pieces(tmp_path: Path):
    (tmp_path / "damaged").mkdir()
    path = tmp_path / "damaged" / "a.parquet"
    texts = [f"{number} {'x' * 1000}" for number in range(8000)]
    plain: dict = {"compression": "none", "use_dictionary": False, "data_page_size": 1 << 14}
    parquet.write_table(pyarrow.table({"text": texts, "other": texts}), path, row_group_size=8000, **plain)
    text, other = (parquet.read_metadata(path).row_group(0).column(index) for index in (0, 1))
    with path.open("r+b") as file:
        for start, length in ((other.data_page_offset, 1 << 20), (text.data_page_offset + (6 << 20), 1 << 20)):
            file.seek(start)
            file.write(b"\xff" * length)
    prompts = StreamSampler(f"hf:{path.parent}?window=1000", Share(1000, 1, seed=0))
    assert sorted(next_texts(prompts, 3)) == sorted(texts[:3000])
    with pytest.raises(ValueError, match="Invalid or truncated"):
        next_texts(prompts, 5)


def test_a_resumed_stream_does_not_depend_on_how_much_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "table").mkdir()
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "table" / "a.parquet")
    source, share = f"hf:{tmp_path / 'table'}?window=8", Share(5, 1, seed=0)
    monkeypatch.setattr(stream, "_PARQUET_ROWS", 7)
    uninterrupted = StreamSampler(source, share)
    next_texts(uninterrupted, 6)
    monkeypatch.setattr(stream, "_PARQUET_ROWS", 4)
    resumed = StreamSampler(source, share)
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    assert next_texts(resumed, 9) == next_texts(uninterrupted, 9)


def test_of_jsonl_no_more_is_read_at_the_start_than_a_few_megabytes(tmp_path: Path):
    folder = write(tmp_path / "damaged", [f"{number} {'x' * 1000}" for number in range(12_000)])
    with (folder / "a.jsonl").open("a") as file:
        file.write("no json\n")
    prompts = StreamSampler(f"hf:{folder}?window=1000", Share(1000, 1, seed=0))
    assert len({*next_texts(prompts, 3)}) == 3000
    with pytest.raises(Exception, match="JSON parse error"):
        next_texts(prompts, 5)


def test_a_parquet_file_without_the_column_is_named(tmp_path: Path):
    (tmp_path / "mixed").mkdir()
    for name, column in (("a", "text"), ("b", "caption")):
        parquet.write_table(pyarrow.table({column: TEXTS}), tmp_path / "mixed" / f"{name}.parquet")
    prompts = StreamSampler(f"hf:{tmp_path / 'mixed'}?window=50", Share(50, 1, seed=0))
    assert len(next_texts(prompts, 1)) == 50
    with pytest.raises(ValueError, match=r"^prompts.source=hf:.* has no column text in its file .*b.parquet; give it"):
        next_texts(prompts, 1)


def test_a_measurement_takes_the_first_window(source: str):
    first = [Prompt(text) for text in TEXTS[:8]]
    assert load_prompts(source) == first
    assert prompts_for_images(load_prompts(source), 4, seed=1) == prompts_for_images(first, 4, seed=1)
