"""A model, not a measurement, of what processes say to each other: bytes, seconds, and the batch that pays for them.

What a process sends in an update, with n processes, P bytes of weights and M micro-batches:

    ZeRO 0   2 (n-1)/n P                    gradients, all-reduced once an update
    ZeRO 1   2 (n-1)/n P                    gradients reduce-scattered once an update, new weights gathered
    ZeRO 2   (M + 1) (n-1)/n P              gradients reduce-scattered with every micro-batch, new weights gathered
    ZeRO 3   (3 M + F) (n-1)/n P            weights gathered for every forward and backward pass, gradients
                                            reduce-scattered with every micro-batch; F forward passes of the rollout

    seconds = bytes / bandwidth             of NVLink within a node, of the slower of NVLink and a node's interconnect
                                            beyond it: rings run through every GPU and leave a node by all its cards
    efficiency = compute / (compute + (1 - overlap) seconds)

Left out: latency, congestion, what small messages cost, stragglers. DeepSpeed 0.19.8 overlaps by default under ZeRO-3
alone, and reduces the gradients of ZeRO 1 and 2 by an all-reduce of which each keeps its part, (n-1)/n P more a time.
"""

from __future__ import annotations

from dataclasses import dataclass

_MOST_SAMPLES = 4096  # a process and update; beyond it nobody trains


@dataclass(frozen=True)
class Network:
    """Bandwidths in bytes a second, in one direction."""

    within_node: float  # of one GPU
    between_nodes: float  # of one node, all its cards together
    gpus_per_node: int = 8

    def bandwidth(self, num_processes: int) -> float:
        """At which a ring through all processes runs."""
        if num_processes <= self.gpus_per_node:
            return self.within_node
        return min(self.within_node, self.between_nodes)


@dataclass(frozen=True)
class Workload:
    """What a sample costs, and how samples become micro-batches."""

    num_weights: int
    bytes_per_weight: int  # as they travel: 2 in bfloat16, 4 in float32
    seconds_per_sample: float  # of compute, rollout and update together
    transitions_per_sample: int
    micro_batch_size: int  # transitions of a forward and backward pass
    rollout_steps: int  # network passes of a sample
    rollout_micro_batch_size: int  # samples


def bytes_sent(
    zero_stage: int, num_processes: int, weight_bytes: int, num_micro_batches: int, num_rollout_forwards: int = 0
) -> float:
    """By one process in one update; num_rollout_forwards: passes without gradient between two updates."""
    share = (num_processes - 1) / num_processes * weight_bytes
    return (
        share
        * {
            0: 2,
            1: 2,
            2: num_micro_batches + 1,
            3: 3 * num_micro_batches + num_rollout_forwards,
        }[zero_stage]
    )


def efficiency(
    work: Workload, network: Network, zero_stage: int, num_processes: int, samples: int, overlap: float = 0.0
) -> float:
    """Share of the time spent computing; samples: of a process and update; overlap: share of the bytes' time hidden."""
    micro_batches = -(-samples * work.transitions_per_sample // work.micro_batch_size)
    forwards = -(-samples // work.rollout_micro_batch_size) * work.rollout_steps
    weight_bytes = work.num_weights * work.bytes_per_weight
    sent = bytes_sent(zero_stage, num_processes, weight_bytes, micro_batches, forwards)
    compute = samples * work.seconds_per_sample
    return compute / (compute + (1 - overlap) * sent / network.bandwidth(num_processes))


def smallest_global_batch(
    work: Workload,
    network: Network,
    zero_stage: int,
    num_processes: int,
    least: float = 0.9,
    overlap: float = 0.0,
) -> int | None:
    """The first number of samples an update, over all processes, whose efficiency is above `least`; None: never."""
    for samples in range(1, _MOST_SAMPLES + 1):
        if efficiency(work, network, zero_stage, num_processes, samples, overlap) > least:
            return samples * num_processes
    return None
