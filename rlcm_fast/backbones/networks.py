"""Loads the networks of a diffusers folder or hub id, and refuses weights that are missing, misfit or not finite.

The libraries fill missing weights with random numbers and warn; nobody reads the warning, and training then starts from
them. Here that is an error with numbers and an example.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from rlcm_fast.backbones.model_files import has_variant


class BrokenWeights(OSError):
    """Weights are missing, have another shape, or are not finite."""


class Where:
    """A diffusers folder or hub id, of which networks are loaded one by one."""

    def __init__(self, path: str, folder: Path, revision: str | None, variant: str | None) -> None:
        """folder: where the files of `path` are, `path` itself or a place in the hub's cache."""
        self.path, self.folder, self.revision, self.variant = path, folder, revision, variant

    def load(self, name: str, class_name: str, dtype: torch.dtype) -> nn.Module:
        """Loads a network; name: its folder, or "" if `path` is that of the network alone.

        Raises:
            BrokenWeights: weights are missing, have another shape, or are not finite.
        """
        # Find the place, and the variant if the network has it.
        place, more = self.path, {}
        if Path(self.path).is_dir():
            place = str(Path(self.path) / name)
        else:
            more = {"revision": self.revision or "main", **({"subfolder": name} if name else {})}
        is_known = self.folder.is_dir()  # not for a network alone that is still on a hub
        variant = self.variant if not is_known or has_variant(self.folder / name, self.variant) else None

        # Load it, and look at what its library would have passed over.
        kind: Any = class_of(class_name)
        shown = name or class_name
        try:
            network, info = kind.from_pretrained(
                place,
                dtype=dtype,
                variant=variant,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **more,
            )
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise OSError(f"its {shown} does not fit its config ({type(error).__name__}: {error})") from error
        _check_keys(shown, network, info)
        check_finite(shown, network)
        return network.eval()


def class_of(class_name: str) -> Any:
    """Returns the network class of diffusers or transformers; None if neither has one of that name."""
    for library, base in ((diffusers, diffusers.ModelMixin), (transformers, transformers.PreTrainedModel)):
        found = getattr(library, class_name, None)
        if isinstance(found, type) and issubclass(found, base):
            return found
    return None


def _check_keys(name: str, network: nn.Module, info: dict[str, Any]) -> None:
    """Raises BrokenWeights if the library filled weights with random numbers, by what it says of its loading."""
    num_weights = len(network.state_dict())
    for verb, field in (("lacks", "missing_keys"), ("has other shapes for", "mismatched_keys")):
        keys = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info.get(field) or ())
        if keys:
            raise BrokenWeights(f"its {name} {verb} {len(keys)} of {num_weights} weights, such as {keys[0]}")


def check_finite(name: str, network: nn.Module) -> None:
    """Raises BrokenWeights if a weight of a network is NaN or infinite; one pass over the weights, without a copy."""
    broken = [key for key, weight in network.state_dict().items() if not _is_finite(weight)]
    if broken:
        found = f"{len(broken)} weights, such as {broken[0]}"
        raise BrokenWeights(f"its {name} has NaN or infinite numbers in {found}")


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or weight.numel() == 0:
        return True
    least, most = weight.aminmax()  # NaN if there is one
    return bool(torch.isfinite(least) & torch.isfinite(most))
