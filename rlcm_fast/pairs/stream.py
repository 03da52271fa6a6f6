"""Makes batches of pairs, which worker processes decode ahead, and a cursor to resume from.

The main process reads the rows, each a path or bytes that are not yet decoded. It passes them to the workers as the
indices of DataLoader's `batch_sampler`, and the batches come back in order. So neither the pairs nor the cursor depend
on the number of workers, and a checkpoint needs only one cursor per process.
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
        self._batches: Iterator[tuple[Tensor, list[str]] | BadPair] | None = None
        self._cursor = self._reader.cursor()  # of the last batch returned; the reader itself is ahead
        self._ahead: deque[dict[str, Any]] = deque()

    def next_batch(self) -> tuple[Tensor, list[str]]:
        """The next images (B, 3, H, W) float32 in [0, 1] and their captions."""
        if self._batches is None:
            self._batches = iter(self._loader())
        batch = next(self._batches)
        if isinstance(batch, BadPair):
            raise batch
        images, texts = batch
        self._cursor = self._ahead.popleft()
        return images.float() / 255, texts

    def state_dict(self) -> dict[str, Any]:
        """The cursors of all processes, as JSON, the same on every rank; every rank must call this."""
        cursors = parallel.all_gather_list([self._cursor])
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
        if len(state["cursors"]) == parallel.world_size():
            self._reader.seek(state["cursors"][parallel.rank()])
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
            keywords = {"multiprocessing_context": "spawn", "worker_init_fn": _leave_interrupts_to_the_trainer}
        return DataLoader(
            self._decoder,  # pyright: ignore[reportArgumentType]  # the index is the row itself
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
    """Make a worker ignore Ctrl-C, which reaches every process of a terminal: the trainer still saves a checkpoint.

    SIGTERM must still end a worker. A main process that exits without closing its workers would otherwise wait forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
