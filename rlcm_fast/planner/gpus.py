"""GPUs as their vendor describes them, for `rlcm-fast plan`; we measured none of these numbers.

bf16 rates are dense (no sparsity) and accumulate in float32, as torch's matrix products do. On GeForce cards this is
half of the figure that is advertised for float16 accumulation. In float32, torch's defaults use TF32 for convolutions
(dense, too) and no tensor cores for matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH_UTILISATION = 0.8
"""Share of the bandwidth that an optimizer step reaches; assumed until someone measures it."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    bf16_tflop_s: float
    tf32_tflop_s: float
    fp32_tflop_s: float
    source: str

    def seconds(self, convolution_flops: float, other_flops: float, is_bf16: bool) -> float:
        """Seconds that floating point operations would take at the full rate; efficiency.py has the share of it."""
        if is_bf16:
            return (convolution_flops + other_flops) / (self.bf16_tflop_s * 1e12)
        return convolution_flops / (self.tf32_tflop_s * 1e12) + other_flops / (self.fp32_tflop_s * 1e12)

    def seconds_to_move(self, num_bytes: float) -> float:
        """Seconds to read or write `num_bytes` of the GPU's memory at the assumed utilisation."""
        return num_bytes / (self.bandwidth_gb_s * 1e9 * BANDWIDTH_UTILISATION)


_AMPERE = "NVIDIA Ampere GA102 white paper"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "rtx3060",
            12,
            360,
            25.5,
            12.7,
            12.7,
            f"NVIDIA product page; bf16: 28 multiprocessors at 1.777 GHz by the rate of each in the {_AMPERE}",
        ),
        Gpu("rtx3090", 24, 936, 71, 35.6, 35.6, _AMPERE),
        Gpu("rtx4090", 24, 1008, 165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture white paper"),
        Gpu("rtx5090", 32, 1792, 209.5, 104.8, 104.8, "NVIDIA RTX Blackwell GPU architecture white paper"),
        Gpu("a6000", 48, 768, 154.8, 77.4, 38.7, f"NVIDIA RTX A6000 data sheet and {_AMPERE}"),
        Gpu("a100-40gb", 40, 1555, 312, 156, 19.5, "NVIDIA A100 data sheet (SXM and PCIe, 40 GB)"),
        Gpu("a100-80gb", 80, 2039, 312, 156, 19.5, "NVIDIA A100 data sheet (SXM, 80 GB)"),
        Gpu("h100", 80, 3350, 989, 495, 67, "NVIDIA H100 data sheet (SXM)"),
        Gpu("h200", 141, 4800, 989, 495, 67, "NVIDIA H200 data sheet (SXM)"),
    )
}


def find_gpu(name: str) -> Gpu:
    """Finds the GPU of that name, in upper or lower case and with or without spaces, dashes and "rtx".

    Raises:
        ValueError: the table has no GPU of that name.
    """
    wanted = _plain(name)
    for gpu in GPUS.values():
        if _plain(gpu.name) == wanted:
            return gpu
    raise ValueError(f"gpu={name} is not in the table; give one of {', '.join(GPUS)}, or leave --gpu out for all")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).removeprefix("rtx")
