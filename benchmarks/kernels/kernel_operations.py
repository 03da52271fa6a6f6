"""The operations that bench_kernels.py times and tests/ hold against float64: one table, an entry an operation.

An entry makes its inputs, calls the public function of `rlcm_fast.kernels.functional`, and says how many bytes must
move. States and noise are float32, as in training; `dtype` is that of the network's outputs and of their gradients.

Bytes: each input is read once and each result written once, in each of the passes. A backward pass runs after all of
the forward pass, so one float32 tensor of the latents' size passes between them, written and read; that is the least,
as reading the inputs once more, as our kernels do, would move more. On-policy nothing passes between them. What the
caches save or an implementation adds is not in it.
"""

# N rows (samples or transitions), C H W latent, D = C H W; coef rows are A, B, sigma

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlcm_fast.kernels import functional, reference

Shape = tuple[int, int, int]  # C, H, W
Inputs = tuple[Tensor, ...]

CLIP_RANGE, ADVANTAGE_CLIP, GUIDANCE_SCALE, ETA = 1e-4, 10.0, 7.5, 1.0
_NUM_ACTIONS = 8  # of a trajectory
_FLOAT = 4  # bytes
_HIDDEN_SIZES = ("1280x16x16", "640x64x64", "320x64x64")  # of SD1.5's and SDXL's UNets


@dataclass(frozen=True)
class Operation:
    """An entry of the table. If `wanted` is set, the last input is the incoming gradient, not for `call`."""

    name: str
    make: Callable[[int, Shape, torch.dtype, torch.device], Inputs]
    call: Callable[..., Any]  # on the inputs; what comes from above is of its first result
    num_bytes: Callable[[Inputs], int]
    wanted: tuple[int, ...] = ()  # places of the inputs whose gradients are taken
    has_latents: bool = True  # else its inputs have N numbers, whatever the latent's size and dtype
    sizes: tuple[str, ...] = ()  # its own, smallest first, where those of latents are not what it meets

    def inputs(self, num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Fresh ones, the same in every call."""
        made = self.make(num_rows, shape, dtype, device)
        return tuple(tensor.requires_grad_(i in self.wanted) for i, tensor in enumerate(made))

    def run(self, inputs: Inputs, call: Callable[..., Any] | None = None) -> list[Tensor]:
        """All results, then the gradients that are wanted; `call` may be a compiled one.

        What comes from above is given, and nothing is added to a .grad: an operation's own launches and no more.
        """
        call = call or self.call
        if not self.wanted:
            return flat(call(*inputs))
        results = flat(call(*inputs[:-1]))
        gradients = torch.autograd.grad(results[0], [inputs[i] for i in self.wanted], inputs[-1])
        return [*(result.detach() for result in results), *gradients]


def flat(results: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(results, Tensor):
        return [results]
    parts = vars(results).values() if isinstance(results, reference.RatioStats) else results
    tensors = []
    for part in parts:
        tensors += flat(part)
    return tensors


def size_in_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _latents(
    num_rows: int, shape: Shape, dtypes: Sequence[torch.dtype], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Normal numbers (N, C, H, W), one tensor a dtype, and coef (N, 3) with sigma in [0.1, 1)."""
    generator = _generator(device)
    size = (num_rows, *shape)
    tensors = [torch.randn(size, generator=generator, device=device).to(dtype) for dtype in dtypes]
    coef = torch.rand(num_rows, 3, generator=generator, device=device)
    coef[:, 2] = 0.1 + 0.9 * coef[:, 2]
    return tensors, coef


def _log_ratios(num_rows: int, device: torch.device) -> Tensor:
    """(N,), within and beyond the clip range and never so near to it that rounding decides."""
    pattern = torch.tensor([0.0, 0.3, -0.3, 3.0, -3.0], device=device) * CLIP_RANGE
    return pattern.repeat(-(-num_rows // len(pattern)))[:num_rows]


def _advantages(num_rows: int, device: torch.device) -> Tensor:
    return 2 * torch.randn(num_rows, generator=_generator(device), device=device)


def _log_prob_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    (x, m, noise), coef = _latents(num_rows, shape, (torch.float32, dtype, torch.float32), device)
    return x, m, reference.gaussian_step(x, m, coef, noise)[0], coef


def _log_prob_training_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return *_log_prob_inputs(num_rows, shape, dtype, device), torch.linspace(-1, 2, num_rows, device=device)


def _guided_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    (x, m, noise, m_uncond), coef = _latents(num_rows, shape, (torch.float32, dtype, torch.float32, dtype), device)
    x_next, _ = reference.gaussian_step(x, reference.guided(m, m_uncond, GUIDANCE_SCALE), coef, noise)
    return x, m, x_next, coef, m_uncond


def _step_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    (x, m, noise), coef = _latents(num_rows, shape, (torch.float32, dtype, torch.float32), device)
    return x, m, coef, noise


def _seeded_step_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    (x, m), coef = _latents(num_rows, shape, (torch.float32, dtype), device)
    return x, m, coef, torch.arange(num_rows, device=device)


def _clipped_loss_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    log_prob_old = torch.randn(num_rows, generator=_generator(device), device=device) - 1
    log_prob = log_prob_old + _log_ratios(num_rows, device)
    return log_prob, log_prob_old, _advantages(num_rows, device), torch.ones((), device=device)


def _policy_loss_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    x, m, x_next, coef = _log_prob_inputs(num_rows, shape, dtype, device)
    log_prob_old = reference.gaussian_log_prob(x, m, x_next, coef) - _log_ratios(num_rows, device)
    return x, m, x_next, coef, log_prob_old, _advantages(num_rows, device), torch.ones((), device=device)


def _on_policy_loss_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    *latents_and_coef, _, advantages, upstream = _policy_loss_inputs(num_rows, shape, dtype, device)
    return *latents_and_coef, advantages, upstream


def _on_policy_loss(x: Tensor, m: Tensor, x_next: Tensor, coef: Tensor, advantages: Tensor) -> Any:
    return functional.policy_loss(x, m, x_next, coef, None, advantages, CLIP_RANGE, ADVANTAGE_CLIP)


def _rebel_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """N pairs of trajectories."""
    size, generator = (2 * num_rows, _NUM_ACTIONS), _generator(device)
    log_prob = torch.randn(size, generator=generator, device=device)
    log_prob_old = torch.randn(size, generator=generator, device=device)
    return log_prob, log_prob_old, _advantages(2 * num_rows, device)


def _norm_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Hidden states x, weight, bias."""
    generator, size = _generator(device), (num_rows, *shape)
    x = 3 * torch.randn(size, generator=generator, device=device) + 1
    weight, bias = torch.randn(2, shape[0], generator=generator, device=device)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def _norm_training_inputs(num_rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    x, weight, bias = _norm_inputs(num_rows, shape, dtype, device)
    dy = torch.randn(x.shape, generator=_generator(device).manual_seed(1), device=device).to(dtype)
    return x, weight, bias, dy


def _group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.group_norm_silu(x, math.gcd(x.shape[1], 32), weight, bias)


def _bytes_of_training(inputs: Inputs) -> int:
    """Bytes of the log-probs and of their gradient in the network's output m."""
    x, m, x_next, coef, *of_rows = inputs
    between = 2 * _FLOAT * m.numel()
    return size_in_bytes(x, m, x_next, m, *of_rows) + between + 2 * size_in_bytes(coef) + _FLOAT * len(x)


def _bytes_of_policy_loss(inputs: Inputs) -> int:
    """`_bytes_of_training` with the log-probs' gradient (written and read), the loss and 6 stats for the log-probs."""
    return _bytes_of_training(inputs) + _FLOAT * len(inputs[0]) + 7 * _FLOAT


def _bytes_of_on_policy_loss(inputs: Inputs) -> int:
    """One pass: its gradient in m needs no sum over a row."""
    return size_in_bytes(*inputs, inputs[1]) + 7 * _FLOAT


def _bytes_of_step(inputs: Inputs) -> int:
    return size_in_bytes(*inputs) + _FLOAT * (inputs[0].numel() + len(inputs[0]))


OPERATIONS = (
    Operation(
        "policy_loss forward+backward",
        _policy_loss_inputs,
        partial(functional.policy_loss, clip_range=CLIP_RANGE, advantage_clip=ADVANTAGE_CLIP),
        _bytes_of_policy_loss,
        wanted=(1,),
    ),
    Operation(
        "policy_loss on-policy forward+backward",
        _on_policy_loss_inputs,
        _on_policy_loss,
        _bytes_of_on_policy_loss,
        wanted=(1,),
    ),
    Operation(
        "gaussian_log_prob forward",
        _log_prob_inputs,
        functional.gaussian_log_prob,
        lambda inputs: size_in_bytes(*inputs) + _FLOAT * len(inputs[0]),
    ),
    Operation(
        "gaussian_log_prob forward+backward",
        _log_prob_training_inputs,
        functional.gaussian_log_prob,
        _bytes_of_training,
        wanted=(1,),
    ),
    Operation(
        "gaussian_log_prob guided",
        _guided_inputs,
        partial(functional.gaussian_log_prob, guidance_scale=GUIDANCE_SCALE),
        lambda inputs: size_in_bytes(*inputs) + _FLOAT * len(inputs[0]),
    ),
    Operation("gaussian_step noise", _step_inputs, functional.gaussian_step, _bytes_of_step),
    Operation(
        "gaussian_step seeds",
        _seeded_step_inputs,
        lambda x, m, coef, seeds: functional.gaussian_step(x, m, coef, seeds=seeds),
        _bytes_of_step,
    ),
    Operation(
        "clipped_ratio_loss forward+backward",
        _clipped_loss_inputs,
        partial(functional.clipped_ratio_loss, clip_range=CLIP_RANGE, advantage_clip=ADVANTAGE_CLIP),
        lambda inputs: size_in_bytes(*inputs) + 7 * _FLOAT + 3 * size_in_bytes(inputs[0]),
        wanted=(0,),
        has_latents=False,
    ),
    Operation(
        "rebel_residual",
        _rebel_inputs,
        partial(functional.rebel_residual, eta=ETA),
        lambda inputs: size_in_bytes(*inputs) + _FLOAT * 3 * len(inputs[0]) // 2,
        has_latents=False,
    ),
    Operation(
        "group_norm_silu forward",
        _norm_inputs,
        _group_norm_silu,
        lambda inputs: size_in_bytes(*inputs, inputs[0]),
        sizes=_HIDDEN_SIZES,
    ),
    Operation(
        "group_norm_silu forward+backward",
        _norm_training_inputs,
        _group_norm_silu,
        # x, weight, bias -> y; then x, weight, bias, dy -> dx, dweight, dbias
        lambda inputs: 3 * size_in_bytes(*inputs[:3]) + size_in_bytes(inputs[0], inputs[3]),
        wanted=(0, 1, 2),
        sizes=_HIDDEN_SIZES,
    ),
)


def parse_shape(text: str) -> Shape:
    """4x64x64 -> (4, 64, 64)."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"sizes={text} is no C x H x W; write it as 4x64x64")
    return int(parts[0]), int(parts[1]), int(parts[2])


def find_operations(names: Sequence[str]) -> list[Operation]:
    """The operations whose names begin with one of `names`; ValueError if a name fits none."""
    known = [operation.name for operation in OPERATIONS]
    for name in names:
        if not any(each.startswith(name) for each in known):
            raise ValueError(f"operations={name} is unknown; give the beginning of one of: {', '.join(known)}")
    return [operation for operation in OPERATIONS if operation.name.startswith(tuple(names))]
