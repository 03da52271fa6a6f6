"""What every Triton kernel costs on every kind of GPU, compiled ahead of time: no GPU is needed.

    python benchmarks/kernels/kernel_resources.py --out benchmarks/results/kernel_resources.csv

Each operation is called as a user calls it, on CPU tensors, and where it would launch a kernel the kernel is compiled
for the architecture instead. A row for each operation, kernel, architecture, dtype and memory format: registers a
thread; spilled bytes (stack and local memory, which should be 0); shared memory; and the loads from global memory by
their width: a `vector` load brings 16 bytes a thread, which is how every tensor of N rows should come in; `narrow` ones
are scalars such as a row's coefficients. The last line on stdout is the summary.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kernels.kernel_driver import pretending
from benchmarks.shared.reporting import print_summary, write_csv

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_SHAPE = (64, 4, 64, 64)
_UNET_SHAPE = (2, 320, 64, 64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"compute capabilities times ten (default {' '.join(map(str, ARCHITECTURES))})"
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, metavar="SM", help=text)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernel_resources.csv"))
    arguments = parser.parse_args()
    rows = measure(arguments.architectures)
    write_csv(arguments.out.with_suffix(".csv"), rows)
    print_summary(summarise(rows))
    return 0


def measure(architectures: tuple[int, ...] = ARCHITECTURES) -> list[dict[str, Any]]:
    """The rows of the table."""
    import torch

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    formats = (torch.contiguous_format, torch.channels_last)
    rows = []
    for architecture, dtype, memory_format in itertools.product(architectures, dtypes, formats):
        labels = {
            "architecture": f"sm_{architecture}",
            "dtype": str(dtype).removeprefix("torch."),
            "format": str(memory_format).removeprefix("torch.").removesuffix("_format"),
        }
        for operation, call in operations(dtype, memory_format).items():
            with pretending(architecture) as kernels:
                call()
            for kernel in kernels:
                rows.append({"operation": operation, "kernel": kernel.name, **labels, **resources(kernel)})
    return rows


def operations(dtype: Any, memory_format: Any) -> dict[str, Callable[[], Any]]:
    """Every operation with its backward pass, all tensors of rows in one dtype and format."""
    import torch

    from rlcm_fast.kernels.triton_ops import accumulation, adamw, gaussian, group_norm, loss, rebel

    def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
        return torch.zeros(shape, dtype=dtype).to(memory_format=memory_format)

    # Latents, and what comes with their rows.
    x, m, m_uncond, x_next = zeros(_SHAPE, dtype), zeros(_SHAPE, dtype), zeros(_SHAPE, dtype), zeros(_SHAPE, dtype)
    inputs, above = (x, m, None, x_next, torch.ones(_SHAPE[0], 3), 1.0), torch.ones(())
    coef, rows = torch.ones(_SHAPE[0], 3), torch.zeros(_SHAPE[0])
    pairs = torch.zeros(_SHAPE[0], 4)
    seeds = torch.zeros(_SHAPE[0], dtype=torch.int64)
    trained = m.detach().requires_grad_()
    clip = (rows, rows, 1e-4, 10.0)

    # A weight's 8-bit moments, and the sum of its gradients.
    states = ([zeros(_SHAPE, torch.uint8)], [zeros(_SHAPE, torch.uint8)])
    absmax = ([torch.zeros(x.numel() // 256)], [torch.zeros(x.numel() // 256)])
    rounds = dtype == torch.bfloat16
    of_weights = {
        "adamw_8bit": lambda: adamw.adamw_8bit_(
            [x], [m], *states, *absmax, [0], [1.0] * 8, 1, 0, rounds, rows[:1].squeeze(), None
        )
    }

    addition = torch.ones(2, dtype=torch.int64)
    of_sums = {"add_rounded": lambda: accumulation.add_rounded_(x, m, 0, addition, 0)}

    # Hidden states of a UNet and their norms.
    hidden, dy = zeros(_UNET_SHAPE, dtype), zeros(_UNET_SHAPE, dtype)
    weight, group = torch.ones(_UNET_SHAPE[1], dtype=dtype), torch.ones(_UNET_SHAPE[0], 32)
    norm = (hidden, dy, group, group, weight, weight)
    return {
        **({} if dtype == torch.float16 else of_weights),
        **(of_sums if rounds else {}),
        "log_prob": lambda: gaussian.gaussian_log_prob(x, m, None, x_next, coef, 1.0),
        "log_prob, guided": lambda: gaussian.gaussian_log_prob(x, m, m_uncond, x_next, coef, 2.0),
        "gradient": lambda: gaussian.input_gradient(inputs, 1, rows, above),
        "gradient, known": lambda: gaussian.input_gradient(inputs, 1, rows, above, torch.empty_like(m), 1.0),
        "step": lambda: gaussian.gaussian_step(x, m, None, coef, x_next, None, 1.0),
        "step, guided, seeds": lambda: gaussian.gaussian_step(x, m, m_uncond, coef, None, seeds, 2.0),
        "clipped_ratio_loss": lambda: loss.clipped_ratio_loss(rows, *clip),
        "rebel_residual": lambda: rebel.rebel_residual(pairs, pairs, rows, 1.0),
        "policy_loss": lambda: loss.policy_loss(x, m, None, x_next, coef, 1.0, *clip),
        "policy_loss, guided": lambda: loss.policy_loss(x, m, m_uncond, x_next, coef, 2.0, *clip),
        "policy_loss, on-policy": lambda: loss.policy_loss(x, trained, None, x_next, coef, 1.0, None, *clip[1:]),
        "group_norm_silu": lambda: group_norm.group_norm_silu(hidden, weight, weight, 32, 1e-5, True),
        "group_norm_silu, sums": lambda: group_norm.group_norm_silu_sums(*norm, True),
        "group_norm_silu, gradient": lambda: group_norm.group_norm_silu_input_gradient(
            *norm, torch.ones(2, *group.shape), True
        ),
    }


def resources(kernel: Any) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and loads of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
    vector_loads = [load for load in loads if re.search(r"\.v4\.[bfu]32|\.v2\.[bfu]64|\.v8\.", load)]
    return {
        "registers": number["REG"],
        "spilled_bytes": number["STACK"] + number["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "vector_loads": len(vector_loads),
        "narrow_loads": len(loads) - len(vector_loads),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of each column."""
    summary: dict[str, Any] = {"kernels": len(rows)}
    for column in ("registers", "spilled_bytes", "shared_bytes", "narrow_loads"):
        summary[f"most_{column}"] = max(row[column] for row in rows)
    return summary


if __name__ == "__main__":
    sys.exit(main())
