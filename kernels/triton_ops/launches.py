"""How kernels are launched: from a cache when called eagerly, through torch.library when something traces the call.

Triton finds the compiled kernel anew in every call, from the properties of every argument. Here a plan holds it; the
plan is found by what it depends on: shapes, strides, dtypes and alignment. It also says how the kernel walks over the
rows. So a call costs a look into a dictionary and the launch.

`operator` makes what a tracer sees of a call: a `torch.library.triton_op`, so that Inductor sees the kernels and not a
call of Python. The interpreter's kernels cannot be traced; there an operator is opaque, and its fake skips the launch.
Eager calls do not go through an operator, whose layers of Python cost more than the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from rlcm_fast.kernels.triton_ops.arrival import is_last
from rlcm_fast.kernels.triton_ops.rows import walk_over

# Fused multiply-adds would round differently from the reference, and differently in each version of triton.
EXACT = {"enable_fp_fusion": False, "num_warps": 4}
INTERPRETS = not isinstance(is_last, triton.JITFunction)
_OF_ROWS = ["coef", "seeds", "row_gradient", "above", "log_prob", "log_prob_old", "advantages", "rewards"]
_MAX_PLANS = 4096  # a run has a few dozen; sizes that never repeat must not fill the memory


@dataclass(slots=True)
class Plan:
    """How one kernel runs on one kind of tensors: a program for each tile of each row."""

    device: torch.device
    index: int  # of the CUDA device; -1 on others
    num_rows: int
    num_tiles: int  # of a row
    tail: tuple[Any, ...]  # the last arguments: N, C, P, K, row strides; strides within a row, tile, block; the flags
    start: Callable[..., None] | None = None  # the compiled kernel, once there is one

    @property
    def grid(self) -> tuple[int]:
        return (self.num_rows * self.num_tiles,)


_plans: dict[Hashable, Plan] = {}


def forget_plans() -> None:
    """Compile every kernel anew at its next call: for tools that pretend to have another GPU."""
    _plans.clear()


def plan_for(kernel: str, tensors: Sequence[Tensor], *flags: bool | int) -> Plan:
    """The plan of the kernel of that name for tensors (N, C, H, W) and for its last, constant arguments `flags`.

    Raises:
        ValueError: a tensor is neither contiguous nor channels_last within its rows.
    """
    first = tensors[0]
    parts: list[Hashable] = [kernel, flags, first.get_device(), first.shape]
    for tensor in tensors:
        parts += (tensor.dtype, tensor.stride(), tensor.data_ptr() & 15 == 0)
    key = tuple(parts)
    plan = _plans.get(key)
    return _keep(key, traced_plan(tensors, *flags)) if plan is None else plan


def plan_for_rows(kernel: str, first: Tensor, num_programs: int, *tail: bool | int) -> Plan:
    """The plan of a kernel on numbers of rows alone, for its last arguments `tail`; alignment must not matter to it."""
    key = (kernel, tail, first.get_device(), num_programs)
    plan = _plans.get(key)
    if plan is None:
        index = first.get_device() if first.is_cuda else -1
        plan = _keep(key, Plan(first.device, index, num_programs, 1, tail))
    return plan


def _keep(key: Hashable, plan: Plan) -> Plan:
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def traced_plan(tensors: Sequence[Tensor], *flags: bool | int) -> Plan:
    """A new plan, which needs no memory behind the tensors; raises as plan_for."""
    walk, strides = walk_over(tensors)
    rows, inner = [], []
    for row, channel, position in strides:
        rows.append(row)
        inner += (channel, position)
    device, num_rows = tensors[0].device, tensors[0].shape[0]
    sizes = (num_rows, walk.channels, walk.positions, walk.num_tiles, *rows)
    constants = (*inner, walk.tile_channels, walk.tile_positions, walk.block, walk.interleaved)
    index = tensors[0].get_device() if tensors[0].is_cuda else -1
    return Plan(device, index, num_rows, walk.num_tiles, (*sizes, *constants, *flags))


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: `triton.jit`, but a new N compiles nothing, and numbers of rows may begin anywhere in memory."""
    specialized: dict[str, Any] = {"do_not_specialize": ["N"], "do_not_specialize_on_alignment": _OF_ROWS}
    return triton.jit(function, **specialized)


def launch(kernel: Any, plan: Plan, *arguments: Any) -> None:
    """Launches a kernel by its plan, on the device of the plan, in that device's current stream.

    Pass floats where the kernel computes with floats: triton compiles an int into another kernel, and a plan has one.
    """
    if plan.index >= 0 and plan.index != torch.cuda.current_device():
        with torch.cuda.device(plan.device):
            launch(kernel, plan, *arguments)
        return
    if plan.start is None:
        plan.start = _started(kernel, plan.grid, *arguments, *plan.tail)
    plan.start(*arguments, *plan.tail)


def _started(kernel: Any, grid: tuple[int], *arguments: Any) -> Callable[..., None]:
    """The compiled kernel, which takes all arguments by place; compiled unless triton has it on disk."""
    if INTERPRETS:
        return partial(kernel[grid], **EXACT)
    return kernel.warmup(*arguments, grid=grid, **EXACT)[(*grid, 1, 1)]


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether something else than plain autograd sees the call: torch.compile, export, make_fx, a mode, a transform."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return True
    return torch._C._are_functorch_transforms_active()


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable` for a backward pass, at no cost unless create_graph asks for a second derivative."""
    careful = once_differentiable(backward)

    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        return careful(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return run


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the operator rlcm_fast::`name` of a function that makes its results and launches wrapped kernels."""

    def decorate(function: Callable[..., Any]) -> Any:
        full_name = f"rlcm_fast::{name}"
        if not INTERPRETS:
            return torch.library.triton_op(full_name, function, mutates_args=())
        made = torch.library.custom_op(full_name, function, mutates_args=())
        made.register_fake(function)
        return made

    return decorate


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton` of a kernel; one that is interpreted does nothing on tensors without memory."""
    return _Interpreted(kernel) if INTERPRETS else torch.library.wrap_triton(kernel)


@dataclass(frozen=True)
class _Interpreted:
    kernel: Any

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def start(*arguments: Any) -> None:
            if not any(isinstance(each, Tensor) and is_fake(each) for each in arguments):
                self.kernel[grid](*arguments, **EXACT)

        return start
