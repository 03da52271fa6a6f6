"""How much of a GPU the weights of rewards take, known before they load.

The networks of the same model, dtype and device count once, as they load once (towers.py). Sizes are those of the
default models. Activations are left out: a tower runs on `batch_size` images at once, without gradients, while no
update runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcm_fast.rewards.models import DTYPES, files_of, with_defaults


def gpu_weights(factory: Any, arguments: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """The bytes of each network that `factory`, a reward's class, holds on the process's GPU with `arguments`.

    The key is the same for networks that are shared. Empty for a reward on the CPU, or on no models.
    """
    given = with_defaults(factory, arguments)
    if given is None:
        return {}
    of_part = given.get("embedding_arguments") or given.get("classifier_arguments") or {}
    placed = given if "device" in given else of_part
    dtype, device = placed.get("dtype", "fp32"), placed.get("device", "same")
    if device == "cpu" or dtype not in DTYPES:
        return {}
    sizes = {}
    for files in files_of(factory, arguments):
        for part in files.weights.parts:
            held = part.dtype or dtype
            num_bytes = round(part.million_parameters * 1e6) * DTYPES[held].itemsize
            sizes[(files.source, part.name, held, device)] = num_bytes
    return sizes
