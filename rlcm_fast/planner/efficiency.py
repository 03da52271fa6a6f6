"""Turns floating point operations into seconds, by what an H200 reached; for other GPUs it is an estimate.

    seconds of a UNet's pass = operations x CALL_SECONDS + FLOPs / (rate x UNET_SHARE)

The host starts the operations of a pass one by one, which takes as long for one row as for many: so small micro-batches
waste a GPU, and a faster one more. The constants are fitted, in logarithms, to the four iterations of SD1.5 at 512 x
512 without torch.compile that were measured (benchmarks/results/gpu/nvidia_h200/full_size*.json):

    images    micro-batch    measured, s    planned, s
    32        8              7.28           6.70   -8 %
    64        8              12.28          13.40  +9 %
    32        16             4.99           4.94   -1 %
    32        32             4.04           4.06   +1 %

The two runs in micro-batches of 8 differ by 17 % from each other, so no fit comes closer. torch.compile of the blocks
took 17 % less time; whole networks and CUDA graphs, which do away with most of the host's part, were not measured.
"""

from __future__ import annotations

UNET_SHARE = 0.37
"""Share of the GPU's rate that a UNet's convolutions and matrix products reach."""
CALL_SECONDS = 1.76e-5
"""Seconds that the host takes to start an operation, on 16 cores of a Xeon beside an H200."""
VAE_SHARE = 0.164
"""Share that the VAE's decoder reached in float32, its moves to the GPU and back included: 0.146 and 0.185. That half
precision reaches as much of its own, higher rate is an assumption."""
ERROR = 0.09
"""The largest difference between the fit and what was measured, as a share."""
ASSUMED_SHARE = 0.5
"""Share of the rate that models of rewards reach; nothing was measured."""
MEASURED_ON = "h200"
