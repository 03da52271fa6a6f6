"""Networks that embed images or texts, loaded once and run once for all rewards that share them.

    images -> ImageTower.embed -> (B, E), kept as long as the images live: a micro-batch runs once, whichever reward
                                  asks first and from whichever thread
    texts  -> TextTower.embed  -> (B, E), each text encoded once, alone, without padding

A tower is shared by rewards with the same files, dtype and device, as long as one of them lives. With another dtype
or device the files are loaded again, and a warning says so.

Texts are encoded one at a time, so that an embedding does not depend on what else was asked for: a resumed run has an
empty cache, and must compute the same bits. Without padding a prompt of 10 tokens costs an eighth of one of 77.

On a GPU, a result that another stream computed is waited for on the GPU, not by the host.
"""

# B images, E numbers of an embedding, L tokens

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.utils import logging as transformers_logging

from rlcm_fast import quiet
from rlcm_fast.rewards.models import Placement
from rlcm_fast.rewards.offload import networks_used, note
from rlcm_fast.rewards.pixels import Preparation
from rlcm_fast.rewards.streams import Kept

T = TypeVar("T")
_MAX_TEXTS = 4096  # embeddings kept by a text tower: 16 MB of 1024 numbers each


class ImageTower:
    """Embeds images; a micro-batch that several rewards score at once runs through the network once."""

    def __init__(
        self,
        network: nn.Module,
        read: Callable[[nn.Module, Tensor], Tensor],
        prepare: Preparation,
        place: Placement,
        width: int,
    ) -> None:
        """`read` runs the network on pixels (B, 3, size, size) and returns (B, E), where E is `width`."""
        self.network = network
        self.prepare = prepare
        self.place = place
        self.width = width
        self._read = read
        self._batch_size = place.batch_size
        self._lock = threading.Lock()
        self._embedded: WeakIdKeyDictionary = WeakIdKeyDictionary()  # images -> (version, Future of Kept)

    def limit_batch(self, batch_size: int) -> None:
        """Run on at most `batch_size` images at once; the smallest of all rewards that share the tower counts."""
        self._batch_size = min(self._batch_size, batch_size)

    def embed(self, images: Tensor) -> Tensor:
        """The embeddings (B, E) float32 of images (B, 3, H, W) in [0, 1], on the tower's device, without gradients.

        The result is shared: do not change it.
        """
        # Find out whether these images, unchanged, were embedded before or are being embedded now.
        version = 0 if images.is_inference() else images._version
        with self._lock:
            known = self._embedded.get(images)
            is_first = known is None or known[0] != version
            future: Future[Kept] = Future() if known is None or is_first else known[1]
            if is_first:
                self._embedded[images] = (version, future)

        # Embed them, or wait for the thread that does.
        if is_first:
            self._fulfil(future, images)
        return future.result().get()

    def _fulfil(self, future: Future[Kept], images: Tensor) -> None:
        """Set the future's result; an exception reaches every thread that waits, and is forgotten."""
        try:
            embedded = Kept.of(self._run(images))
        except BaseException as error:
            with self._lock:
                self._embedded.pop(images, None)
            future.set_exception(error)
            raise
        future.set_result(embedded)

    @torch.no_grad()
    def _run(self, images: Tensor) -> Tensor:
        rows = []
        for chunk in images.split(self._batch_size):
            pixels = self.prepare(chunk)
            rows.append(self._read(self.network, pixels.to(self.place.device, self.place.dtype)).float())
        return torch.cat(rows)


class TextTower:
    """Embeds texts, each once."""

    def __init__(
        self, network: nn.Module, read: Callable[[nn.Module, Tensor], Tensor], tokens: Tokens, place: Placement
    ) -> None:
        """`read` runs the network on tokens (1, L) and returns (1, E)."""
        self.network = network
        self.tokens = tokens
        self.place = place
        self._read = read
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Kept] = OrderedDict()  # (E,) of each text, the latest last

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The embeddings (B, E) float32 of texts, on the tower's device, without gradients."""
        with self._lock:  # one thread encodes, others find its result
            by_text = {text: self._of(text) for text in dict.fromkeys(texts)}
        return torch.stack([by_text[text] for text in texts])

    @torch.no_grad()
    def _of(self, text: str) -> Tensor:
        """The embedding (E,) of one text."""
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text].get()
        ids = torch.tensor([self.tokens(text)], device=self.place.device)  # (1, L)
        self._known[text] = Kept.of(self._read(self.network, ids)[0].float())
        if len(self._known) > _MAX_TEXTS:
            self._known.popitem(last=False)
        return self._known[text].get()


class Tokens:
    """Turns a text into tokens, cut at what its network can read; the first cut of each tower is said."""

    def __init__(self, tokenizer: Any, max_tokens: int, reader: str) -> None:
        """`reader` names the network in the warning."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._reader = reader
        self._has_warned = False

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text, with those of its begin and end, at most `max_tokens`.

        Several threads may call it: the tokenizer is not asked to cut, which would change its state.
        """
        ids = list(self._tokenizer(text)["input_ids"])
        if len(ids) <= self._max_tokens:
            return ids
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._reader} reads {self._max_tokens} tokens, and a prompt has {len(ids)}: the rest of it, and of "
                f"other long prompts, does not count; it begins {text[:40]!r}",
                stacklevel=2,
            )
        return [*ids[: self._max_tokens - 1], ids[-1]]


_shared: WeakValueDictionary[tuple[str, str, torch.dtype, torch.device], Any] = (
    WeakValueDictionary()
)  # every tower that a reward holds
_networks: WeakKeyDictionary[Any, list[nn.Module]] = WeakKeyDictionary()  # of each of these towers
_sharing = threading.RLock()


def shared(kind: str, files: Path, place: Placement, make: Callable[[], T]) -> T:
    """The tower of this `kind` made from `files` and placed at `place`; `make` loads it, unless a reward holds it.

    Warns if it is already loaded elsewhere or in another dtype.
    """
    where = (kind, str(files.resolve()))
    key = (*where, place.dtype, place.device)
    with _sharing:
        tower = _shared.get(key)
        if tower is None:
            others = [Placement(dtype, device, 1) for *other, dtype, device in list(_shared) if tuple(other) == where]
            with networks_used() as networks:
                tower = make()
            _networks[tower] = networks
            if others:
                said = " and ".join(map(str, others))
                warnings.warn(
                    f"{files} ({kind}) is loaded again, as {place}, because a reward has it as {said}; give both "
                    "rewards the same dtype and device, and they share it",
                    stacklevel=2,
                )
            _shared[key] = tower
        note(_networks[tower])
        made: object = tower
        if isinstance(made, ImageTower):
            made.limit_batch(place.batch_size)
        return tower


def pooled(network: nn.Module, pixels: Tensor) -> Tensor:
    """Returns the pooled output (B, E) of pixels (B, 3, size, size); DINOv2's is its normalised [CLS] state."""
    return network(pixel_values=pixels).pooler_output


def load(
    network_class: Any, weights: Path | Mapping[str, Tensor], place: Placement, config: Any, **options: bool
) -> nn.Module:
    """Load a network of transformers, frozen, from a folder or from tensors by name; tensors of others are left out.

    Raises ValueError if weights are broken, missing or of another shape; transformers would start them at random.
    """
    is_folder = isinstance(weights, Path)
    where = weights if is_folder else "the file"
    try:
        with _silently():
            network, report = network_class.from_pretrained(
                weights if is_folder else None,
                state_dict=None if is_folder else dict(weights),
                config=config,
                dtype=place.dtype,
                local_files_only=True,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except UnpicklingError as error:
        reason = "its weights are a pickle of more than tensors, whose code would run"
        raise ValueError(f"{where} could not be loaded as {network_class.__name__}: {reason}") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where} could not be loaded as {network_class.__name__}: {reason}") from error
    _check_whole(network)
    bad = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
    if bad:
        raise ValueError(f"{where} does not fit {network_class.__name__}: {bad[0]} is missing or has another shape")
    if not is_folder:  # the tensors may be views of a file that is only mapped into memory
        for weight in network.parameters():
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return frozen(network, place)


@contextmanager
def _silently() -> Iterator[None]:
    """Hide the bar and the report of transformers, which lists the weights of the other tower; `load` checks itself."""
    report = logging.getLogger(quiet.MISSING_WEIGHTS)  # with another level it would report layers of parallel models
    had_bar = transformers_logging.is_progress_bar_enabled()
    report.addFilter(_is_error)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        report.removeFilter(_is_error)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def frozen(network: nn.Module, place: Placement) -> nn.Module:
    """Move a network to its place, without gradients or dropout; refuses weights that ZeRO has partitioned."""
    _check_whole(network)
    note([network])
    return network.to(place.device, place.dtype).requires_grad_(False).eval()


def _check_whole(network: nn.Module) -> None:
    """Raises ValueError for a network that was built inside of deepspeed.zero.Init; loading leaves it empty weights."""
    if any(hasattr(weight, "ds_id") or weight.numel() == 0 for weight in network.parameters()):
        raise ValueError("ZeRO has partitioned a reward's weights: build rewards outside of deepspeed.zero.Init")
