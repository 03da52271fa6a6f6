"""Pairs from every kind of source: whole, shuffled, shared out, and the same again after a resume."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import tarfile
import threading
import time
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.pairs import PairsFault, PairStream, reading
from rlcm_fast.pairs.stream import prepare_worker

NUM_PAIRS = 24


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (12, 10), (level, level, level))


def as_png(level: int) -> bytes:
    stream = io.BytesIO()
    grey(level).save(stream, "png")
    return stream.getvalue()


def write_imagefolder(folder: Path) -> str:
    for i in range(NUM_PAIRS):
        grey(i).save(folder / f"{i:02}.png")
    lines = [json.dumps({"file_name": f"{i:02}.png", "text": f"grey {i}"}) for i in range(NUM_PAIRS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def write_captioned_files(folder: Path) -> str:
    for i in range(NUM_PAIRS):
        grey(i).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"grey {i}\n")
    return str(folder)


def write_jsonl(folder: Path) -> str:
    (folder / "images").mkdir()
    for i in range(NUM_PAIRS):
        grey(i).save(folder / "images" / f"{i}.png")
    lines = [json.dumps({"image": f"images/{i}.png", "text": f"grey {i}"}) for i in range(NUM_PAIRS)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return str(folder / "pairs.jsonl")


def write_shards(folder: Path, caption: str = "txt") -> str:
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard * 6, shard * 6 + 6):
                text = f"grey {i}" if caption == "txt" else json.dumps({"caption": f"grey {i}"})
                for name, content in ((f"{i:02}.png", as_png(i)), (f"{i:02}.{caption}", text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0..3}.tar")


def write_shards_with_json(folder: Path) -> str:
    return write_shards(folder, "json")


def write_parquet(folder: Path) -> str:
    import datasets

    columns = {"picture": [{"bytes": as_png(i), "path": None} for i in range(NUM_PAIRS)]}
    columns["caption"] = [f"grey {i}" for i in range(NUM_PAIRS)]
    features = datasets.Features({"picture": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return f"hf:{folder}?image=picture&text=caption"


WRITERS = [write_imagefolder, write_captioned_files, write_jsonl, write_shards, write_shards_with_json, write_parquet]


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.param(tmp_path)


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes what is built next believe that it is `rank` of `world_size`, whose cursors are `cursors`."""

    def become(rank: int, world_size: int, cursors: list[Any] | None = None) -> None:
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(parallel, "world_size", lambda: world_size)
        monkeypatch.setattr(parallel, "all_gather_list", lambda mine: cursors if cursors else mine)

    return become


def texts_of(stream: PairStream, num_batches: int) -> list[str]:
    return [text for _ in range(num_batches) for text in stream.next_batch()[1]]


def level_of(image: Tensor) -> int:
    return round(image.mean().item() * 255)


def test_every_pass_holds_every_pair_once_and_shuffled(data: str):
    stream = PairStream(data, 8, 4, seed=3)
    passes = [texts_of(stream, NUM_PAIRS // 4) for _ in range(2)]
    everything = [f"grey {i}" for i in range(NUM_PAIRS)]
    for texts in passes:
        assert sorted(texts) == sorted(everything)
        assert texts != everything
    assert passes[0] != passes[1]


def test_a_caption_is_its_own_images(data: str):
    images, texts = PairStream(data, (8, 6), 8, seed=0).next_batch()
    assert images.shape == (8, 3, 8, 6)
    assert images.dtype == torch.float32
    assert [f"grey {level_of(image)}" for image in images] == texts


def test_the_order_is_the_seeds(data: str):
    first = texts_of(PairStream(data, 8, 4, seed=3), 4)
    assert texts_of(PairStream(data, 8, 4, seed=3), 4) == first
    assert texts_of(PairStream(data, 8, 4, seed=4), 4) != first


def test_processes_share_a_pass(data: str, as_process: Any):
    shares = []
    for rank in range(2):
        as_process(rank, 2)
        shares.append(texts_of(PairStream(data, 8, 4, seed=3), NUM_PAIRS // 2 // 4))
    assert Counter(shares[0] + shares[1]) == Counter(f"grey {i}" for i in range(NUM_PAIRS))


def test_a_process_has_its_own_shards_where_their_number_does_not_divide(tmp_path: Path, as_process: Any):
    data, shares = write_shards(tmp_path), []
    for rank, num_shards in enumerate((2, 1, 1)):
        as_process(rank, 3)
        own = texts_of(PairStream(data, 8, 6, seed=3), num_shards)  # a pass: shards of six pairs
        assert len({int(text.split()[1]) // 6 for text in own}) == num_shards
        shares += own
    assert Counter(shares) == Counter(f"grey {i}" for i in range(NUM_PAIRS))


@pytest.mark.parametrize("num_batches", [0, 3, 7])
def test_a_resumed_stream_goes_on_as_the_uninterrupted_one(
    data: str, num_batches: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reading, "_WINDOW_OF_PATHS", 7)
    monkeypatch.setattr(reading, "_WINDOW_OF_BYTES", 7)
    stream = PairStream(data, 8, 4, seed=3)
    texts_of(stream, num_batches)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = texts_of(stream, 8)
    resumed = PairStream(data, 8, 4, seed=3)
    resumed.load_state_dict(state)
    assert texts_of(resumed, 8) == expected


def test_a_stream_that_has_begun_goes_back(data: str):
    stream = PairStream(data, 8, 4, seed=3)
    expected = texts_of(stream, 3)
    stream.load_state_dict(PairStream(data, 8, 4, seed=3).state_dict())
    assert texts_of(stream, 3) == expected


def test_workers_change_neither_pairs_nor_cursor(tmp_path: Path):
    data = write_shards(tmp_path)
    stream, decoded_ahead = PairStream(data, 8, 4, seed=3), PairStream(data, 8, 4, seed=3, num_workers=2)
    for _ in range(3):
        (images, texts), (other_images, other_texts) = stream.next_batch(), decoded_ahead.next_batch()
        assert texts == other_texts
        assert torch.equal(images, other_images)
        assert decoded_ahead.state_dict() == stream.state_dict()
    decoded_ahead.close()


def _end_while_a_thread_hands_over() -> None:
    """What a worker is when it is closed; without `prepare_worker` it aborts each time."""

    def hand_over() -> None:
        while True:
            ForkingPickler.dumps(torch.zeros(8, 3, 64, 64))

    prepare_worker(0)
    for _ in range(3):
        threading.Thread(target=hand_over, daemon=True).start()
    time.sleep(0.2)


def test_a_worker_ends_well_while_it_hands_a_batch_over():
    worker = torch.multiprocessing.get_context("spawn").Process(target=_end_while_a_thread_hands_over)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0


def test_on_another_number_of_processes_the_next_pass_begins(tmp_path: Path, as_process: Any):
    data = write_jsonl(tmp_path)
    streams, cursors = [], []
    for rank in range(2):
        as_process(rank, 2)
        streams.append(PairStream(data, 8, 4, seed=3))
        texts_of(streams[-1], 1 + rank)
        cursors += streams[-1].state_dict()["cursors"]
    as_process(0, 2, cursors)
    state = streams[0].state_dict()
    as_process(0, 1)
    alone = PairStream(data, 8, 4, seed=3)
    alone.load_state_dict(state)
    assert sorted(texts_of(alone, NUM_PAIRS // 4)) == sorted(f"grey {i}" for i in range(NUM_PAIRS))
    assert alone.state_dict()["cursors"][0]["pass"] == 1


def test_a_functions_pairs_do_not_depend_on_the_number_of_processes(as_process: Any):
    name = "rlcm_fast.shapes.pairs:one_shape"
    together = PairStream(name, 64, 4, seed=3)
    expected = [together.next_batch() for _ in range(2)]
    state: dict[str, Any] = {}
    for rank in range(2):
        as_process(rank, 2)
        share = PairStream(name, 64, 2, seed=3)
        images, texts = share.next_batch()
        assert texts == expected[0][1][rank * 2 : rank * 2 + 2]
        assert torch.equal(images, expected[0][0][rank * 2 : rank * 2 + 2])
        as_process(rank, 2, [share._cursor, share._cursor])
        state = share.state_dict()
    as_process(0, 1)
    alone = PairStream(name, 64, 4, seed=3)
    alone.load_state_dict(state)
    assert alone.next_batch()[1] == expected[1][1]


@pytest.mark.parametrize("kind", ["one", "two", "neutral", "all"])
def test_shapes_are_drawn_as_their_caption_says(kind: str):
    from rlcm_fast.shapes.detector import detect, score
    from rlcm_fast.shapes.grammar import parse

    images, texts = PairStream(f"shapes:{kind}", 64, 16, seed=0).next_batch()
    assert len(set(texts)) > 1
    assert not any(parse(text).is_held_out for text in texts)
    found = [score(detections, parse(text)) for detections, text in zip(detect(images), texts, strict=True)]
    assert np.mean(found) > 0.99


def test_the_shorter_side_is_scaled_and_the_middle_kept():
    from rlcm_fast.pairs.decoding import Decoder
    from rlcm_fast.pairs.sources import Source

    image = Image.new("RGB", (40, 16), (255, 0, 0))  # the middle 16 x 16 is green, the rest red
    image.paste((0, 255, 0), (12, 0, 28, 16))
    stream = io.BytesIO()
    image.save(stream, "png")
    decoder = Decoder(Source("photos", "imagefolder", "photos"), (8, 8))
    pair = decoder[reading.Row({"bytes": stream.getvalue(), "path": None}, "green")]
    assert isinstance(pair, tuple)
    pixels, _ = pair
    assert pixels.shape == (3, 8, 8)
    middle = pixels[:, :, 1:-1]  # bicubic sees the red beyond the edge
    assert (middle[1] == 255).all() and (middle[0] == 0).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_is_left_out_and_the_stream_is_otherwise_the_same(
    tmp_path: Path, num_workers: int
):
    data = write_captioned_files(tmp_path)
    expected = PairStream(data, 8, 4, seed=0)
    batches = [expected.next_batch()[1] for _ in range(8)]  # more than a pass
    (tmp_path / "03.png").write_bytes(b"no image")
    stream = PairStream(data, 8, 4, seed=0, num_workers=num_workers)
    for number, texts in enumerate(batches, 1):
        assert stream.next_batch()[1] == [text for text in texts if text != "grey 3"]
        state = stream.state_dict()["cursors"][0]
        assert state["num_pairs"] == 4 * number
    assert state["num_unreadable"] == stream.count.num_unreadable == sum(texts.count("grey 3") for texts in batches)
    message = r"pretraining.data=[^\n]*: [^\n]*03.png cannot be read [^\n]*; take it out of the data, or repair it"
    assert re.fullmatch(message, stream.count.problem)
    stream.close()  # or a later test waits seconds for the worker, while the garbage collector ends it


@pytest.mark.parametrize("num_batches", [0, 3, 7])
def test_a_stream_with_unreadable_images_goes_on_as_the_uninterrupted_one(tmp_path: Path, num_batches: int):
    data = write_captioned_files(tmp_path)
    for number in (3, 11):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    stream = PairStream(data, 8, 4, seed=3)
    texts_of(stream, num_batches)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = texts_of(stream, 8)
    resumed = PairStream(data, 8, 4, seed=3)
    resumed.load_state_dict(state)
    assert texts_of(resumed, 8) == expected
    assert (resumed.count.num_pairs, resumed.count.num_unreadable) == (
        stream.count.num_pairs,
        stream.count.num_unreadable,
    )


@pytest.mark.parametrize("content", ["jpeg", "png", "webp", "gif"])
def test_whatever_a_broken_image_raises_it_is_skipped(content: str):
    from rlcm_fast.pairs.decoding import Decoder, Unreadable
    from rlcm_fast.pairs.sources import Source

    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, content)
    whole, decoder = stream.getvalue(), Decoder(Source("photos", "imagefolder", "photos"), (8, 8))
    half = decoder[reading.Row({"bytes": whole[: len(whole) // 2], "path": None}, "noise")]
    assert isinstance(half, Unreadable)
    assert re.match(r"pretraining.data=photos: the image of 'noise' cannot be read \(.*\); take it out", half.problem)
    random = np.random.default_rng(0)
    for _ in range(30):
        broken = bytearray(whole)
        for place in random.integers(0, min(len(whole), 600), 20):
            broken[place] = random.integers(256)
        decoder[reading.Row({"bytes": bytes(broken), "path": None}, "noise")]


def test_a_function_that_raises_costs_its_pair(monkeypatch: pytest.MonkeyPatch):
    def of_number(number: int) -> tuple[Image.Image, str]:
        if number % 2:
            raise KeyError(number)
        return grey(1), "grey"

    monkeypatch.setattr("rlcm_fast.shapes.pairs.one_shape", of_number)
    stream = PairStream("shapes:one", 8, 8, seed=0)
    found = [len(stream.next_batch()[1]) for _ in range(4)]
    assert 0 < sum(found) < 32 and stream.count.num_unreadable == 32 - sum(found)
    assert re.search(r"pretraining.data=shapes:one: pair \d+ cannot be read \(KeyError: \d+\)", stream.count.problem)


def test_a_function_that_makes_no_pair_is_a_mistake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.shapes.pairs.one_shape", lambda number: (number, "grey"))
    with pytest.raises(PairsFault, match=r"shapes:one returned <class 'int'>, <class 'str'>; return PIL.Image, str"):
        PairStream("shapes:one", 8, 8, seed=0).next_batch()


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_line():
    stream = PairStream("shapes:one", 64, 4, seed=0, num_workers=1)
    stream.next_batch()
    for worker in stream._batches._workers:  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGKILL)
    message = r"^pretraining.data=shapes:one cannot be read on \(RuntimeError: DataLoader worker [^\n]*\); go on with "
    with pytest.raises(PairsFault, match=message):
        texts_of(stream, 20)
    stream.close()


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path):
    data = write_parquet(tmp_path).replace("text=caption", "text=label")
    with pytest.raises(PairsFault, match=r"in picture, label of a row with picture, caption; name the columns"):
        PairStream(data, 8, 4, seed=0).next_batch()


def test_more_processes_than_pairs_are_refused(tmp_path: Path, as_process: Any):
    data = write_jsonl(tmp_path)
    as_process(NUM_PAIRS, NUM_PAIRS + 1)
    message = f"holds no pair for process {NUM_PAIRS} of {NUM_PAIRS + 1}; give at least one"
    with pytest.raises(PairsFault, match=message):
        PairStream(data, 8, 4, seed=0).next_batch()


def test_a_checkpoint_of_other_data_is_refused():
    state = PairStream("shapes:one", 64, 2, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"^pretraining.data=shapes:two or seed=0 differs from the checkpoint"):
        PairStream("shapes:two", 64, 2, seed=0).load_state_dict(state)
