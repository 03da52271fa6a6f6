"""Models what processes send to each other: bytes, seconds, and the batch that pays for them. Nothing is measured.

What a process sends in an update, with n processes, P bytes of weights and M micro-batches:

    ZeRO 0   2 (n-1)/n P                    gradients, all-reduced once per update
    ZeRO 1   2 (n-1)/n P                    gradients reduce-scattered once per update, new weights gathered
    ZeRO 2   (M + 1) (n-1)/n P              gradients reduce-scattered with every micro-batch, new weights gathered
    ZeRO 3   (3 M + F) (n-1)/n P            weights gathered for every forward and backward pass, gradients
                                            reduce-scattered with every micro-batch; F forward passes of the rollout

    seconds = bytes / bandwidth             NVLink's bandwidth within a node; beyond it the lower of NVLink's and of a
                                            node's interconnect: rings run through every GPU and use all cards of a node
    efficiency = compute / (compute + (1 - overlap) seconds)

The model leaves out latency, congestion, the cost of small messages, and stragglers. By default DeepSpeed 0.19.8
overlaps under ZeRO-3 only. It reduces the gradients of ZeRO 1 and 2 by an all-reduce of which each process keeps its
part, which sends (n-1)/n P more each time.
"""

from __future__ import annotations

from dataclasses import dataclass

_MOST_SAMPLES = 4096  # per process and update; nobody trains with more


@dataclass(frozen=True)
class Network:
    """Bandwidths in bytes per second, in one direction."""

    within_node: float  # one GPU
    between_nodes: float  # one node, all its cards together
    gpus_per_node: int = 8

    def bandwidth(self, num_processes: int) -> float:
        """Bandwidth of a ring through all processes."""
        if num_processes <= self.gpus_per_node:
            return self.within_node
        return min(self.within_node, self.between_nodes)


@dataclass(frozen=True)
class TrafficCase:
    """A run as far as communication depends on it: processes, what a sample costs, how samples make micro-batches."""

    network: Network
    zero_stage: int
    num_processes: int
    num_weights: int
    bytes_per_weight: int  # when sent: 2 in bfloat16, 4 in float32
    seconds_per_sample: float  # of compute, rollout and update together
    transitions_per_sample: int
    micro_batch_size: int  # transitions in a forward and backward pass
    rollout_steps: int  # network passes for a sample
    rollout_micro_batch_size: int  # samples


def bytes_sent(
    zero_stage: int, num_processes: int, weight_bytes: int, num_micro_batches: int, num_rollout_forwards: int = 0
) -> float:
    """Bytes that one process sends in one update; num_rollout_forwards: passes without gradients between updates."""
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


def efficiency(case: TrafficCase, samples: int, overlap: float = 0.0) -> float:
    """Share of the time spent computing, in (0, 1].

    samples: per process and update; overlap: share of the communication that computing hides.
    """
    micro_batches = -(-samples * case.transitions_per_sample // case.micro_batch_size)
    forwards = -(-samples // case.rollout_micro_batch_size) * case.rollout_steps
    weight_bytes = case.num_weights * case.bytes_per_weight
    sent = bytes_sent(case.zero_stage, case.num_processes, weight_bytes, micro_batches, forwards)
    compute = samples * case.seconds_per_sample
    return compute / (compute + (1 - overlap) * sent / case.network.bandwidth(case.num_processes))


def smallest_global_batch(case: TrafficCase, least: float = 0.9, overlap: float = 0.0) -> int | None:
    """Smallest number of samples per update, over all processes, with an efficiency above `least`; None if none has."""
    for samples in range(1, _MOST_SAMPLES + 1):
        if efficiency(case, samples, overlap) > least:
            return samples * case.num_processes
    return None
