"""Batches of pairs, decoded ahead by worker processes, and a cursor to resume from.

Rows are read in the main process (a path, or bytes that are not yet decoded) and handed to the workers as the indices
that DataLoader's `batch_sampler` deals out; batches come back in order. So neither the pairs nor the cursor depend on
the number of workers, and one cursor a process is all there is to save.
"""

# B pairs of this process

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from rlcm_fast import parallel
from rlcm_fast.pairs.decoding import BadPair, Decoder, collate
from rlcm_fast.pairs.reading import DatasetReader, FunctionReader, Row
from rlcm_fast.pairs.sources import FIELD, parse_source


class PairStream:
    """Pairs without end, this process's share."""

    def __init__(
        self, data: str, size: int | tuple[int, int], batch_size: int, seed: int, num_workers: int = 0
    ) -> None:
        """size: pixels, of both sides or (height, width); batch_size: of THIS process; seed: the same on all of them.

        num_workers: processes that decode, ahead of their use; 0 decodes in this one.
        """
        self._source, self._seed, self._batch_size = parse_source(data), seed, batch_size
        self._num_workers = num_workers
        self._decoder = Decoder(self._source, (size, size) if isinstance(size, int) else size)
        share = (seed, parallel.rank(), parallel.world_size())
        self._reader = (
            FunctionReader(*share) if self._source.kind == "function" else DatasetReader(self._source, *share)
        )
        self._batches: Iterator[tuple[Tensor, list[str]] | BadPair] | None = None
        self._cursor = self._reader.cursor()  # of what was handed out; the reader itself is ahead
        self._ahead: deque[dict[str, Any]] = deque()

    def next_batch(self) -> tuple[Tensor, list[str]]:
        """Images (B, 3, H, W) float32 in [0, 1] and their captions."""
        if self._batches is None:
            self._batches = iter(self._loader())
        batch = next(self._batches)
        if isinstance(batch, BadPair):
            raise batch
        images, texts = batch
        self._cursor = self._ahead.popleft()
        return images.float() / 255, texts

    def state_dict(self) -> dict[str, Any]:
        """The cursors of all processes, as JSON, the same on every one; every rank must ask."""
        cursors = parallel.all_gather_list([self._cursor])
        return {"data": self._source.text, "seed": self._seed, "cursors": cursors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the stream that gave `state` would have, exactly so on the same number of processes.

        On another number a function's pairs go on exactly, too, if all processes together take as many as before;
        every other source begins its next pass, so some pairs of the pass that was cut short are seen once less.
        """
        if (state["data"], state["seed"]) != (self._source.text, self._seed):
            raise ValueError(
                f"{FIELD}={self._source.text} or seed={self._seed} is not the checkpoint's ({state['data']},"
                f" {state['seed']}); resume with those, or start a new run from its export"
            )
        self.close()
        if len(state["cursors"]) == parallel.world_size():
            self._reader.seek(state["cursors"][parallel.rank()])
        else:
            self._reader.seek_among(state["cursors"])
        self._cursor = self._reader.cursor()

    def close(self) -> None:
        """Ends the workers and forgets what they decoded ahead."""
        self._batches = None
        self._ahead.clear()

    def _loader(self) -> DataLoader:
        keywords: dict[str, Any] = {}
        if self._num_workers > 0:  # spawned: a fork would copy threads' locks of gloo, CUDA and Arrow
            keywords = {"multiprocessing_context": "spawn", "worker_init_fn": _leave_interrupts_to_the_trainer}
        return DataLoader(
            self._decoder,  # pyright: ignore[reportArgumentType]  # a row, and not its number, is its index
            batch_sampler=self._rows(),  # pyright: ignore[reportArgumentType]
            collate_fn=collate,
            num_workers=self._num_workers,
            **keywords,
        )

    def _rows(self) -> Iterator[list[Row]]:
        while True:
            rows = self._reader.take(self._batch_size)
            self._ahead.append(self._reader.cursor())
            yield rows


def _leave_interrupts_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches every process of a terminal, and the trainer still saves a checkpoint after it.

    SIGTERM must end a worker, or a main process that exits without having closed it would wait for it forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
