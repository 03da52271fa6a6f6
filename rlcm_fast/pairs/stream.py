"""Makes batches of pairs, which worker processes decode ahead, and a cursor to resume from.

The main process reads the rows, each a path or bytes that are not yet decoded. It passes them to the workers as the
indices of DataLoader's `batch_sampler`, and the batches come back in order. So neither the pairs nor the cursor depend
on the number of workers, and a checkpoint needs only one cursor per process.

A pair that cannot be read is left out of its batch, which is then smaller; nothing takes its place, so the other pairs
and the cursor do not depend on it. `count` counts them.
"""

# B pairs of this process

from __future__ import annotations

import atexit
import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from rlcm_fast import parallel
from rlcm_fast.pairs.decoding import BadPair, Batch, Decoder
from rlcm_fast.pairs.faults import PairsFault
from rlcm_fast.pairs.reading import DatasetReader, FunctionReader, Row
from rlcm_fast.pairs.sources import FIELD, parse_source


@dataclass(frozen=True)
class Count:
    """How many pairs of a stream this process has read, and how many of them could not be read."""

    num_pairs: int = 0
    num_unreadable: int = 0
    problem: str = ""  # of the last unreadable pair: one line that names its file

    def plus(self, problems: Sequence[str], num_pairs: int) -> Count:
        """The count after a batch of num_pairs pairs with these problems."""
        last = problems[-1] if problems else self.problem
        return Count(self.num_pairs + num_pairs, self.num_unreadable + len(problems), last)


class PairStream:
    """An endless stream of this process's share of the pairs."""

    def __init__(
        self, data: str, size: int | tuple[int, int], batch_size: int, seed: int, num_workers: int = 0
    ) -> None:
        """Open the source `data`, from its first pair on.

        size           pixels of both sides, or (height, width)
        batch_size     pairs per batch on THIS process
        seed           must be the same on all processes
        num_workers    processes that decode ahead; 0 decodes in this process
        """
        self._source, self._seed, self._batch_size = parse_source(data), seed, batch_size
        self._num_workers = num_workers
        self._decoder = Decoder(self._source, (size, size) if isinstance(size, int) else size)

        # Read this process's share of the rows; workers start with the first batch.
        share = (seed, parallel.rank(), parallel.world_size())
        self._reader = (
            FunctionReader(*share) if self._source.kind == "function" else DatasetReader(self._source, *share)
        )
        self._batches: Iterator[Batch | BadPair] | None = None
        self.count = Count()  # over the whole run, if the number of processes stays
        self._cursor = self._reader.cursor()  # of the last batch returned; the reader itself is ahead
        self._ahead: deque[dict[str, Any]] = deque()

    def next_batch(self) -> tuple[Tensor, list[str]]:
        """The next images (B, 3, H, W) float32 in [0, 1] and their captions; B is batch_size less what is unreadable.

        Raises PairsFault, in one line, if the data or a worker process fail.
        """
        batch = self._next()
        if isinstance(batch, BadPair):
            raise PairsFault(str(batch)) from batch
        self.count = self.count.plus(batch.problems, self._batch_size)
        self._cursor = self._ahead.popleft()
        return batch.images.float() / 255, batch.texts

    def _next(self) -> Batch | BadPair:
        try:
            if self._batches is None:
                self._batches = iter(self._loader())
            return next(self._batches)
        except Exception as error:
            is_ours = isinstance(error, ValueError) and str(error).startswith(FIELD)  # of reading.py, with a way out
            said = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            line = f"{FIELD}={self._source.text} cannot be read on ({said}); go on with --resume latest"
            if self._num_workers > 0:
                line += ", and with fewer pretraining.workers if memory ran out"
            raise PairsFault(str(error) if is_ours else line) from error

    def state_dict(self) -> dict[str, Any]:
        """The cursors of all processes, as JSON, the same on every rank; every rank must call this."""
        counted = {"num_pairs": self.count.num_pairs, "num_unreadable": self.count.num_unreadable}
        cursors = parallel.all_gather_list([{**self._cursor, **counted}])
        return {"data": self._source.text, "seed": self._seed, "cursors": cursors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the stream that returned `state` would; exactly so on the same number of processes.

        On another number of processes, the pairs of a function also continue exactly, if all processes together take as
        many as before. Every other source begins its next pass, so some pairs of the interrupted pass are seen once
        less.
        """
        if (state["data"], state["seed"]) != (self._source.text, self._seed):
            raise ValueError(
                f"{FIELD}={self._source.text} or seed={self._seed} differs from the checkpoint ({state['data']},"
                f" {state['seed']}); resume with its values, or start a new run with --resume_weights_only PATH"
            )
        self.close()
        self.count = Count()
        if len(state["cursors"]) == parallel.world_size():
            cursor = state["cursors"][parallel.rank()]
            self._reader.seek(cursor)
            self.count = Count(cursor.get("num_pairs", 0), cursor.get("num_unreadable", 0))
        else:
            self._reader.seek_among(state["cursors"])
        self._cursor = self._reader.cursor()

    def close(self) -> None:
        """End the workers and drop the batches that they decoded ahead."""
        self._batches = None
        self._ahead.clear()

    def _loader(self) -> DataLoader:
        keywords: dict[str, Any] = {}
        if self._num_workers > 0:
            # Spawn them, because a fork would copy the locks of gloo's, CUDA's and Arrow's threads.
            keywords = {"multiprocessing_context": "spawn", "worker_init_fn": prepare_worker}
        return DataLoader(
            self._decoder,  # pyright: ignore[reportArgumentType]  # the index is the row itself
            batch_sampler=self._rows(),  # pyright: ignore[reportArgumentType]
            collate_fn=self._decoder.collate,
            num_workers=self._num_workers,
            **keywords,
        )

    def _rows(self) -> Iterator[list[Row]]:
        while True:
            rows = self._reader.take(self._batch_size)
            self._ahead.append(self._reader.cursor())
            yield rows


def prepare_worker(_: int) -> None:
    """Lets the trainer alone answer Ctrl-C, and ends a worker without Python's own farewell, as a fork would end.

    Ctrl-C reaches every process of a terminal, and the trainer still saves a checkpoint. SIGTERM must still end a
    worker: a main process that exits without closing its workers would otherwise wait forever.

    When a worker is closed, its thread may still hand batches over. Python's farewell takes that thread down inside of
    torch, which aborts with "terminate called without an active exception"; the trainer would raise that abort.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit.register(os._exit, 0)
