"""A recorder of device work for CPUs: it replays operations as a CUDA graph does, and refuses what a graph cannot do.

It notes every operation below autograd with its arguments. A replay runs the same operations on the same tensors and
writes the results to the addresses of the recording, whatever has happened on the host in between: numbers, branches
and random draws are those of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlcm_fast.graphs import leaves


class CpuRecorder:
    """Counts recordings and replays, too."""

    def __init__(self) -> None:
        self.num_recorded, self.num_replayed, self.num_forgotten = 0, 0, 0
        self.num_operations = 0  # of the last recording

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        with _Recording(operations):
            outputs = run()
        self.num_recorded, self.num_operations = self.num_recorded + 1, len(operations)

        def replay() -> None:
            self.num_replayed += 1
            with torch._C._AutoDispatchBelowAutograd():
                for function, arguments, keywords, results in operations:
                    _write(function(*arguments, **keywords), results, tree_leaves((arguments, keywords)))

        return outputs, replay

    def forget(self) -> None:
        self.num_forgotten += 1


class _Recording(TorchDispatchMode):
    def __init__(self, operations: list[Any]) -> None:
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("it waits for the device: a tensor was read on the host")
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if draws and "attention" not in func.__name__:  # attention has the tag for its dropout, which we do not use
            raise RuntimeError(f"it draws random numbers: {func}")
        results = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, results))
        return results


class ArgumentRecorder:
    """Runs the function anew instead of replaying it, and notes what a graph would freeze.

    replays: of each, the operations with their host arguments and the addresses of tensors that none of them made.
    """

    def __init__(self) -> None:
        self.replays: list[list[tuple[str, list[Any]]]] = []

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        outputs = run()

        def replay() -> None:
            with _Noting() as noted:
                again = run()
            for kept, found in zip(leaves(outputs), leaves(again), strict=True):
                kept.copy_(found)
            self.replays.append(noted.operations)

        return outputs, replay

    def forget(self) -> None:
        raise AssertionError("a graph was recorded anew")


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[Any]]] = []
        self._made: dict[int, Tensor] = {}  # by storage; held, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        storages = {_storage(argument) for argument in given if isinstance(argument, Tensor)}
        self.operations.append((str(func), [self._described(argument) for argument in given]))
        results = func(*args, **(kwargs or {}))
        made = [result for result in tree_leaves(results) if isinstance(result, Tensor)]
        self._made |= {_storage(result): result for result in made if _storage(result) not in storages}
        return results

    def _described(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return repr(argument)  # NaN is NaN
        return "made here" if _storage(argument) in self._made else (_storage(argument), argument.storage_offset())


def _write(new: Any, old: Any, arguments: list[Any]) -> None:
    """Copies new results over old ones, unless these are arguments themselves or views of them."""
    storages = {_storage(argument) for argument in arguments if isinstance(argument, Tensor)}
    for result, kept in zip(tree_leaves(new), tree_leaves(old), strict=True):
        if isinstance(kept, Tensor) and _storage(kept) not in storages:
            kept.copy_(result)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
