"""Every kernel operation once on the GPU, on odd sizes and in both memory formats: a script for compute-sanitizer."""

from __future__ import annotations

import torch
from kernel_checks import relaid, run

from benchmarks.kernels.kernel_operations import OPERATIONS

if __name__ == "__main__":
    device = torch.device("cuda")
    for operation in OPERATIONS:
        for shape in ((3, 5, 7), (4, 48, 53)):
            inputs = operation.inputs(3, shape, torch.bfloat16, device)
            run(operation, "triton", inputs)
            run(operation, "triton", relaid(inputs, torch.channels_last))
    torch.cuda.synchronize()
