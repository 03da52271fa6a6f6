"""The difference between two UNets as a LoRA: the best matrices of a rank for each linear and convolution layer.

    D = W_tuned - W_start ~ up @ down,   up = U sqrt(S), down = sqrt(S) V^T of the largest singular values of D

U and S come from the eigenvectors of D D^T (or of D^T D, if that is smaller), in float64: exact, and for the largest
layer of Stable Diffusion 1.5 (1280 x 23040) a matrix of 1280 x 1280.
"""

# R rank, D difference (O, I) of a layer, with the window of a convolution in I

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlcm_fast.backbones.lora_layouts import LoraLayer


@dataclass(frozen=True)
class Extracted:
    """A LoRA, and how much of the difference it leaves out; both shares are of the norm of the whole difference."""

    layers: dict[str, LoraLayer]
    error: float  # relative, in [0, 1]: |D - up @ down| / |D| over all weights
    unreachable: float  # of it, what lies in weights that a LoRA does not reach: norms and biases


@torch.no_grad()
def extract_lora(start: nn.Module, tuned: Mapping[str, Tensor], rank: int) -> Extracted:
    """Computes the LoRA that turns the network `start` into one with the weights `tuned`, as well as `rank` allows.

    Raises:
        ValueError: the networks have other shapes, or the weights are the same.
    """
    # Go through the layers; what is not the weight of one stays out.
    layers: dict[str, LoraLayer] = {}
    left = reached = 0.0
    weights = start.state_dict()
    modules = dict(start.named_modules())
    for name, before in weights.items():
        if name not in tuned or tuned[name].shape != before.shape:
            raise ValueError(f"the difference is between networks of other layers: {name} is not in both")
        difference = tuned[name].double().cpu() - before.double().cpu()
        place, _, last = name.rpartition(".")
        if last == "weight" and isinstance(modules[place], nn.Linear | nn.Conv2d):
            layer, rest = _truncated(difference, rank)
            reached += rest
            if layer is not None:
                layers[place] = layer
        else:
            left += difference.square().sum().item()

    # Sum the squares up.
    total = sum((tuned[name].double().cpu() - weights[name].double().cpu()).square().sum().item() for name in weights)
    if total == 0:
        raise ValueError("the weights are those of the start model: there is no difference to extract")
    return Extracted(layers, math.sqrt((reached + left) / total), math.sqrt(left / total))


def _truncated(difference: Tensor, rank: int) -> tuple[LoraLayer | None, float]:
    """Returns the best layer of a rank, None for no difference, and the squared norm of what it leaves out."""
    matrix = difference.flatten(1)  # (O, I)
    total = matrix.square().sum().item()
    if total == 0:
        return None, 0.0
    is_wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if is_wide else matrix.T
    rank = min(rank, len(short))
    squares, vectors = torch.linalg.eigh(short @ short.T)  # ascending
    vectors, squares = vectors[:, -rank:].flip(1), squares[-rank:].flip(0).clamp(min=0)
    across = vectors.T @ short  # (R, longer side), rows of length sqrt(square)

    # Share the singular values between both matrices, so that neither overflows in half precision.
    root = squares.sqrt().sqrt().clamp(min=1e-12)
    thin, wide = vectors * root, across / root[:, None]
    up, down = (thin, wide) if is_wide else (wide.T, thin.T)
    rest = max(0.0, total - across.square().sum().item())
    if difference.dim() == 4:
        up, down = up[:, :, None, None], down.reshape(rank, *difference.shape[1:])
    return LoraLayer(down.float().contiguous(), up.float().contiguous(), float(rank)), rest
