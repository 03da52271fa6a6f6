"""Bytes, seconds and batch sizes of the model in rlcm_fast/planner/communication.py: computed, nothing is measured.

    python benchmarks/memory/communication_table.py --out benchmarks/results/communication.csv

SD1.5's UNet trained whole in bfloat16 by RLCM at 8 steps, on H100s. A row for each ZeRO stage, number of GPUs and
network: what a process sends in an update of --samples samples, how long that takes, and the smallest batch whose
efficiency is above --least. Prints the table too, and the
rows as JSON on the last line.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from benchmarks.shared.reporting import print_summary, write_csv
from rlcm_fast.planner.communication import Network, TrafficCase, bytes_sent, efficiency, smallest_global_batch

NUM_WEIGHTS = 859_600_000
FLOP_PER_SAMPLE = 28.4e12  # 8 steps sampled and trained, VAE included
PEAK_FLOPS = 989e12  # H100, bfloat16 without sparsity, as its maker says
UTILISATION = 0.5  # assumed
NETWORKS = {  # what their makers say, of which a run reaches a part
    "8 x 400 Gb/s a node": Network(within_node=450e9, between_nodes=400e9),
    "100 Gb/s a node": Network(within_node=450e9, between_nodes=12.5e9),
}
NUM_GPUS = (1, 8, 64, 512)


def main() -> int:
    arguments = _parser().parse_args()
    rows = table(arguments.samples, arguments.least)
    write_csv(arguments.out, rows)
    print(markdown(rows))
    print_summary({"rows": rows})
    return 0


def table(samples: int, least: float) -> list[dict[str, Any]]:
    """A row for each network, ZeRO stage and number of GPUs; times and batches without overlap and with half of it."""
    rows = []
    for network, stage, num_gpus in itertools.product(NETWORKS, (0, 1, 2, 3), NUM_GPUS):
        rows.append(_row(network, stage, num_gpus, samples, least))
    return rows


def _row(network: str, stage: int, num_gpus: int, samples: int, least: float) -> dict[str, Any]:
    # What a process sends in an update.
    case = _case(NETWORKS[network], stage, num_gpus)
    forwards = -(-samples // case.rollout_micro_batch_size) * case.rollout_steps
    sent = bytes_sent(stage, num_gpus, case.num_weights * case.bytes_per_weight, samples, forwards)
    row = {
        "network": network,
        "zero_stage": stage,
        "gpus": num_gpus,
        "samples_per_gpu": samples,
        "gigabytes_sent_per_update": round(sent / 1e9, 3),
        "milliseconds": round(1e3 * sent / case.network.bandwidth(num_gpus), 2),
        "efficiency_without_overlap": round(efficiency(case, samples), 4),
    }

    # The smallest batch with which that costs little.
    for overlap in (0.0, 0.5):
        batch = smallest_global_batch(case, least, overlap)
        row[f"batch_{least:g}_overlap_{overlap:g}"] = "never" if batch is None else batch
    return row


def _case(network: Network, stage: int, num_gpus: int) -> TrafficCase:
    return TrafficCase(
        network,
        stage,
        num_gpus,
        NUM_WEIGHTS,
        bytes_per_weight=2,
        seconds_per_sample=FLOP_PER_SAMPLE / (PEAK_FLOPS * UTILISATION),
        transitions_per_sample=8,
        micro_batch_size=8,
        rollout_steps=8,
        rollout_micro_batch_size=8,
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each number of GPUs and kind of ZeRO, the networks side by side; one GPU says nothing to itself."""
    names = "".join(f" {network}: ms, efficiency, batch for 90 % |" for network in NETWORKS)
    lines = [f"| GPUs | ZeRO | GB sent a GPU and update |{names}", "|---" * (3 + len(NETWORKS)) + "|"]
    for num_gpus in NUM_GPUS:
        for stages, stage in (("0, 1", 1), ("2", 2), ("3", 3)):
            chosen = [row for row in rows if row["gpus"] == num_gpus and row["zero_stage"] == stage]
            sent = chosen[0]["gigabytes_sent_per_update"]
            lines.append(f"| {num_gpus} | {stages} | {sent:.1f} |" + "".join(_cell(row) for row in chosen))
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    batch = row["batch_0.9_overlap_0"]
    batch = f"{batch:,}" if isinstance(batch, int) else batch
    return f" {row['milliseconds']:,.0f}, {100 * row['efficiency_without_overlap']:.0f} %, {batch} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="samples of an update and GPU")
    parser.add_argument("--least", type=float, default=0.9, help="efficiency to keep")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/communication.csv"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
