from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.bench_rewards import NETWORKS
from rlcm_fast.config import RewardConfig
from rlcm_fast.rewards import gpu_bytes

CLIP_L_IMAGES, CLIP_L_TEXTS, CLIP_H = 304_000_000, 123_700_000, 986_100_000
OWLV2 = 154_900_000


def _tones(**arguments: str) -> RewardConfig:
    return RewardConfig("distribution_parity", arguments={"classifier": "skin_tone", "classifier_arguments": arguments})


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([RewardConfig("jpeg_compressibility")], 0),
        ([RewardConfig("my_rewards:Redness")], 0),  # not even imported
        ([RewardConfig("vlm_alignment", arguments={"device": "cpu"})], 0),
        ([RewardConfig("aesthetic")], 4 * CLIP_L_IMAGES),
        ([RewardConfig("aesthetic", arguments={"dtype": "bf16"})], 2 * CLIP_L_IMAGES),
        ([RewardConfig("aesthetic", arguments={"device": "cpu"})], 0),
        ([RewardConfig("aesthetic"), RewardConfig("clip_score")], 4 * (CLIP_L_IMAGES + CLIP_L_TEXTS)),
        (
            [RewardConfig("clip_score"), RewardConfig("diversity", arguments={"embedding": "clip"})],
            4 * (CLIP_L_IMAGES + CLIP_L_TEXTS),
        ),
        (
            [RewardConfig("aesthetic"), RewardConfig("clip_score", arguments={"dtype": "bf16"})],
            4 * CLIP_L_IMAGES + 2 * (CLIP_L_IMAGES + CLIP_L_TEXTS),  # loaded twice
        ),
        ([RewardConfig("pickscore"), RewardConfig("hps_v2")], 2 * 4 * CLIP_H),
        ([RewardConfig("diversity")], 0),
        ([RewardConfig("object_detection")], 4 * OWLV2),
        ([RewardConfig("distribution_parity", arguments={"classifier": "skin_tone"})], 0),
        ([RewardConfig("object_detection"), _tones(faces="owlv2")], 4 * OWLV2),
        ([_tones(model="my/tones", dtype="bf16")], 2 * 85_800_000),
        ([_tones(model="my/tones", device="cpu")], 0),
    ],
)
def test_weights_on_the_gpu_are_counted_once_where_they_are_shared(rewards: list[RewardConfig], expected: int):
    assert gpu_bytes(rewards) == expected


@pytest.mark.slow
def test_the_facts_state_the_sizes_and_flops_of_the_real_architectures():
    """On meta tensors, but for Mask2Former, which computes on the CPU; of one image, or of one prompt of 16 tokens."""
    for name, network in NETWORKS.items():
        with torch.device("cpu" if name.startswith("Mask2Former") else "meta"):
            module, inputs = network.build(), network.inputs(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(**inputs)
        millions = sum(weight.numel() for weight in module.parameters()) / 1e6
        assert network.part.million_parameters == pytest.approx(millions, abs=0.05), name
        assert network.part.gflops == pytest.approx(counter.get_total_flops() / 1e9, abs=0.06), name
