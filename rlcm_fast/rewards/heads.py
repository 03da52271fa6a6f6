"""The head of the aesthetic predictors and of ImageReward: five linear layers without activations between them.

Such a head is one affine map, w . e + b. The layers are multiplied out in float64 when they load; the result differs
from the layers run in float32 by less than 1e-5 of a score.
"""

# E numbers of an embedding

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class AffineHead(nn.Module):
    """e -> w . e + b."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """weight (E,) and bias () are kept in float32."""
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, embedded: Tensor) -> Tensor:
        """The scores (B,) float32 of embedded (B, E), computed in float32."""
        return embedded.float() @ self.weight + self.bias


def multiply_out(tensors: Mapping[str, Tensor], prefix: str, layers: tuple[int, ...], width: int) -> AffineHead:
    """The head whose layers are `PREFIX.N.weight` and `PREFIX.N.bias` for N in `layers`; it takes `width` numbers.

    What stands before the prefix does not matter. Raises ValueError if a layer is missing or the width is another.
    """
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for number in layers:
        name = f"{prefix}.{number}"
        found = {key.rpartition(name)[2]: value.double() for key, value in tensors.items() if _is_of(key, name)}
        if found.keys() != {".weight", ".bias"}:
            raise ValueError(f"lacks {name}.weight or {name}.bias")
        if found[".weight"].shape[1] != len(bias):
            raise ValueError(f"has {name}.weight for {found['.weight'].shape[1]} numbers, not for {len(bias)}")
        weight, bias = found[".weight"] @ weight, found[".weight"] @ bias + found[".bias"]
    return AffineHead(weight[0], bias[0])


def _is_of(key: str, name: str) -> bool:
    """Tells whether `key` is a weight or bias of the layer `name`, with or without something before it."""
    stem = key.rpartition(".")[0]
    return stem == name or stem.endswith(f".{name}")


def read_tensors(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file; of the latter two only tensors are ever loaded, never code.

    Raises ValueError if the file is broken, or holds anything else.
    """
    try:
        if file.suffix.lower() == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError(f"{file} is no file of tensors alone: it is a pickle whose code would run") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file} is no file of tensors: {str(error).splitlines()[0][:200]}") from error
    return loaded.get("state_dict", loaded)
