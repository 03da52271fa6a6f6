"""Small random detectors and classifiers in the layouts of the rewards' models, with words their tokenizers know."""

from __future__ import annotations

from pathlib import Path

import tiny_rewards
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
)

SIZE = 32  # pixels that the OWLv2 model sees
CLASSES = ("person", "bicycle", "car", "dog", "mouse", "dining table")


def save_owlv2(folder: Path) -> str:
    """Saves an OWLv2 model of 16 patches with its tokenizer."""
    tokenizer = tiny_rewards.clip_words()
    torch.manual_seed(5)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **sizes,
        "hidden_size": 16,
        "intermediate_size": 24,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tiny_rewards.MAX_TOKENS,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {**sizes, "hidden_size": 24, "intermediate_size": 32, "image_size": SIZE, "patch_size": 8}
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
    tiny_rewards.enlarge(model, 5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_mask2former(folder: Path) -> str:
    """Saves a Mask2Former model of 6 classes and 10 queries."""
    torch.manual_seed(6)
    backbone = SwinConfig(
        image_size=64,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],  # pyright: ignore[reportCallIssue]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,  # group norms of 32 groups
        encoder_feedforward_dim=24,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=24,
        num_attention_heads=2,
        num_queries=10,
        id2label=dict(enumerate(CLASSES)),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    tiny_rewards.enlarge(model, 6)
    model.save_pretrained(folder)
    return str(folder)


def save_vit(folder: Path, num_labels: int = 4) -> str:
    """Saves a ViT classifier."""
    torch.manual_seed(7)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    labels = {number: f"tone {number}" for number in range(num_labels)}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, id2label=labels))
    tiny_rewards.enlarge(model, 7)
    model.save_pretrained(folder)
    return str(folder)
