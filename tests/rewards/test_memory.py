from __future__ import annotations

import pytest

from rlcm_fast.config import RewardConfig
from rlcm_fast.rewards import gpu_bytes

CLIP_L_IMAGES, CLIP_L_TEXTS, CLIP_H = 304_000_000, 123_700_000, 986_100_000


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
    ],
)
def test_weights_on_the_gpu_are_counted_once_where_they_are_shared(rewards: list[RewardConfig], expected: int):
    assert gpu_bytes(rewards) == expected


@pytest.mark.slow
def test_the_facts_state_the_sizes_and_flops_of_the_real_architectures():
    """On meta tensors; FLOPs of one image, or of one prompt of 16 tokens."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    from rlcm_fast.rewards import clip, embeddings, image_reward, siglip

    def vit(width: int, layers: int, projection: int) -> transformers.CLIPVisionModelWithProjection:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 16, "patch_size": 14}
        config = transformers.CLIPVisionConfig(**sizes, intermediate_size=4 * width, projection_dim=projection)
        return transformers.CLIPVisionModelWithProjection(config)

    def text(width: int, layers: int) -> transformers.CLIPTextModelWithProjection:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
        config = transformers.CLIPTextConfig(**sizes, intermediate_size=4 * width, projection_dim=width)
        return transformers.CLIPTextModelWithProjection(config)

    blip = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16}
    dino = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14}
    eye = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
    reader = {"vocab_size": 30524, "encoder_hidden_size": 1024, "num_attention_heads": 12, "is_decoder": True}
    with torch.device("meta"):
        pixels, ids = torch.zeros(1, 3, 224, 224), torch.zeros(1, 16, dtype=torch.long)
        cases = [
            (clip.L.parts[0], vit(1024, 24, 768), {"pixel_values": pixels}),
            (clip.L.parts[1], text(768, 12), {"input_ids": ids}),
            (clip.H_PARTS[0], vit(1280, 32, 1024), {"pixel_values": pixels}),
            (clip.H_PARTS[1], text(1024, 24), {"input_ids": ids}),
            (
                siglip.SO400M.parts[0],
                transformers.SiglipVisionModel(
                    transformers.SiglipVisionConfig(**eye, intermediate_size=4304, image_size=384)
                ),
                {"pixel_values": torch.zeros(1, 3, 384, 384)},
            ),
            (
                embeddings.DINO.parts[0],
                transformers.Dinov2Model(transformers.Dinov2Config(**dino, image_size=518)),
                {"pixel_values": pixels},
            ),
            (
                image_reward.MODEL.parts[0],
                transformers.BlipVisionModel(
                    transformers.BlipVisionConfig(**blip, intermediate_size=4096, image_size=224)
                ),
                {"pixel_values": pixels},
            ),
            (
                image_reward.MODEL.parts[1],
                BlipTextModel(transformers.BlipTextConfig(**reader), add_pooling_layer=False),
                {"input_ids": ids, "encoder_hidden_states": torch.zeros(1, 197, 1024), "is_decoder": False},
            ),
        ]
        for part, network, inputs in cases:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(**inputs)
            millions = sum(weight.numel() for weight in network.parameters()) / 1e6
            assert part.million_parameters == pytest.approx(millions, abs=0.05)
            assert part.gflops == pytest.approx(counter.get_total_flops() / 1e9, abs=0.06)
