"""How long the networks of rewards take for an image, at their real sizes with random weights.

    python benchmarks/speed/bench_rewards.py                          # fp32 on the CPU, one image at a time
    python benchmarks/speed/bench_rewards.py --device cuda:0 --dtype bf16 --batch-size 32 --images 256

The images are noise of 512 x 512 pixels on the network's device; their preparation counts. Random weights take as long
as real ones. Texts are prompts of 16 tokens, one at a time. On a CPU the seconds are those of one core at
work, whatever else the machine does; set OMP_NUM_THREADS=1. Prints a line per network and JSON on the last line.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextModel

from benchmarks.shared.reporting import print_summary
from rlcm_fast.rewards import clip, embeddings, image_reward, mask2former, owlv2, siglip
from rlcm_fast.rewards.facts import Part
from rlcm_fast.rewards.models import Placement
from rlcm_fast.rewards.pixels import HALF, IMAGENET_MEAN, IMAGENET_STD, Preparation
from rlcm_fast.rewards.towers import frozen

NUM_TOKENS = 16
_BLIP_PATCHES, _BLIP_WIDTH = 197, 1024


@dataclass(frozen=True)
class Network:
    """A network of a reward at its real size."""

    part: Part  # what FACTS says of it
    build: Callable[[], nn.Module]
    prepare: Preparation | None  # None: it reads texts

    def inputs(self, num_images: int) -> dict[str, Any]:
        """What a forward pass takes, for images that are prepared, or for texts; on the default device."""
        if self.prepare is not None:
            return {"pixel_values": torch.zeros(num_images, 3, self.prepare.size, self.prepare.size)}
        texts: dict[str, Any] = {"input_ids": torch.zeros(num_images, NUM_TOKENS, dtype=torch.long)}
        if self.part is image_reward.MODEL.parts[1]:
            patches = torch.zeros(num_images, _BLIP_PATCHES, _BLIP_WIDTH)
            texts |= {"encoder_hidden_states": patches, "is_decoder": False}
        return texts


def _vit(width: int, layers: int, projection: int) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    config = transformers.CLIPVisionConfig(**sizes, intermediate_size=4 * width, projection_dim=projection)
    return transformers.CLIPVisionModelWithProjection(config)


def _clip_text(width: int, layers: int) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    config = transformers.CLIPTextConfig(**sizes, intermediate_size=4 * width, projection_dim=width)
    return transformers.CLIPTextModelWithProjection(config)


def _siglip() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
    config = transformers.SiglipVisionConfig(**sizes, intermediate_size=4304, image_size=384)
    return transformers.SiglipVisionModel(config)


def _dino() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=518))


def _blip_vision() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": _BLIP_WIDTH,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
    }
    return transformers.BlipVisionModel(transformers.BlipVisionConfig(**sizes, intermediate_size=4096, image_size=224))


def _blip_text() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 30524, "encoder_hidden_size": _BLIP_WIDTH, "num_attention_heads": 12}
    return BlipTextModel(transformers.BlipTextConfig(**sizes, is_decoder=True), add_pooling_layer=False)


class _Owlv2Images(nn.Module):
    """The half of OWLv2 that reads images, with the heads of boxes and classes."""

    def __init__(self) -> None:
        super().__init__()
        text: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 1}  # not run
        vision: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
        config = transformers.Owlv2Config(
            text_config=text, vision_config={**vision, "image_size": 960, "patch_size": 16}, projection_dim=512
        )
        model = transformers.Owlv2ForObjectDetection(config)
        model.owlv2.text_model = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        feature_map, _ = self.model.image_embedder(pixel_values)  # pyright: ignore[reportAssignmentType]
        features = feature_map.flatten(1, 2)
        queries = features.new_ones(len(features), 2, 512)
        self.model.box_predictor(features, feature_map)
        return self.model.class_predictor(features, queries)[0]


def _owlv2_text() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
    return transformers.Owlv2TextModel(transformers.Owlv2TextConfig(**sizes, max_position_embeddings=16))


def _mask2former() -> nn.Module:
    stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    sizes: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    config = transformers.Mask2FormerConfig(backbone_config=transformers.SwinConfig(**sizes, **stages), num_labels=80)  # pyright: ignore
    return transformers.Mask2FormerForUniversalSegmentation(config)


NETWORKS = {
    "CLIP ViT-L/14, image": Network(clip.L.parts[0], lambda: _vit(1024, 24, 768), Preparation(224)),
    "CLIP ViT-L/14, text": Network(clip.L.parts[1], lambda: _clip_text(768, 12), None),
    "CLIP ViT-H/14, image": Network(clip.H_PARTS[0], lambda: _vit(1280, 32, 1024), Preparation(224)),
    "CLIP ViT-H/14, text": Network(clip.H_PARTS[1], lambda: _clip_text(1024, 24), None),
    "SigLIP so400m, image": Network(siglip.SO400M.parts[0], _siglip, Preparation(384, HALF, HALF, "squash")),
    "DINOv2 base, image": Network(embeddings.DINO.parts[0], _dino, Preparation(224, shortest_side=256)),
    "BLIP large, image": Network(image_reward.MODEL.parts[0], _blip_vision, Preparation(224)),
    "BLIP large, pair": Network(image_reward.MODEL.parts[1], _blip_text, None),
    "OWLv2 base, image": Network(owlv2.OWLV2.parts[0], _Owlv2Images, Preparation(960)),
    "OWLv2 base, text": Network(owlv2.OWLV2.parts[1], _owlv2_text, None),
    "Mask2Former Swin-S, image": Network(
        mask2former.MASK2FORMER.parts[0], _mask2former, Preparation(800, IMAGENET_MEAN, IMAGENET_STD)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--images", type=int, default=4, help="images, or texts, that are timed")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="beginnings of names; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    place = Placement.of(arguments.dtype, arguments.device, arguments.batch_size)

    rows = {}
    for name, network in NETWORKS.items():
        if arguments.networks and not name.startswith(tuple(arguments.networks)):
            continue
        rows[name] = measure(network, place, arguments.images)
        line = f"{name:26} {rows[name]['ms_per_item']:9.1f} ms, {rows[name]['tflops_per_second']:7.2f} TFLOP/s"
        print(f"{line}, {rows[name]['weights_gib']:5.2f} GiB of weights, {rows[name]['peak_gib'] or '-'} at the peak")
    print_summary({"networks": rows, "dtype": arguments.dtype, "batch_size": place.batch_size}, arguments.out)


@torch.no_grad()
def measure(network: Network, place: Placement, num_items: int) -> dict[str, float | None]:
    """Milliseconds per image or text, after one batch that does not count, and memory."""
    # Build it, with weights of a usual size.
    module = network.build()
    for weight in module.parameters():
        weight.normal_(std=0.02)
    module = frozen(module, place)
    is_cuda = place.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(place.device)

    # Time batches.
    batch_size = place.batch_size if network.prepare is not None or is_cuda else 1
    batch = _batch(network, place, batch_size)
    num_batches = max(1, num_items // batch_size)
    clock = time.perf_counter if is_cuda else time.process_time
    seconds = 0.0
    for number in range(num_batches + 1):
        start = clock()
        _forward(module, network, place, batch)
        if is_cuda:
            torch.cuda.synchronize(place.device)
        seconds += clock() - start if number else 0.0

    # Report.
    per_item = seconds / num_batches / batch_size
    num_bytes = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    return {
        "ms_per_item": 1000 * per_item,
        "tflops_per_second": network.part.gflops / per_item / 1000,
        "weights_gib": num_bytes / 2**30,
        "peak_gib": round(torch.cuda.max_memory_allocated(place.device) / 2**30, 2) if is_cuda else None,
    }


def _batch(network: Network, place: Placement, batch_size: int) -> dict[str, Any]:
    """Images of 512 pixels, or texts."""
    if network.prepare is not None:
        return {"images": torch.rand(batch_size, 3, 512, 512, device=place.device)}
    inputs = network.inputs(batch_size)
    return {name: _placed(value, place) for name, value in inputs.items()}


def _placed(value: Any, place: Placement) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(place.device, place.dtype if value.is_floating_point() else None)


def _forward(module: nn.Module, network: Network, place: Placement, batch: dict[str, Any]) -> None:
    if network.prepare is None:
        module(**batch)
    else:
        module(pixel_values=network.prepare(batch["images"]).to(place.dtype))


if __name__ == "__main__":
    main()
