"""Small random models in the layouts of the rewards' models, and words that their tokenizers know."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
)

from rlcm_fast.trajectory import Prompt

WIDTH = 12  # of the CLIP model's embeddings
SIZE = 16  # pixels that it sees
MAX_TOKENS = 32
TEXTS = ("a cat", "two dogs", "a cat", "a red car 7")
PROMPTS = [Prompt(text) for text in TEXTS]
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "red", "car", "7")  # of a BERT
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,"


def images(size: int = 24, seed: int = 0) -> Tensor:
    """Four noisy images (4, 3, size, size), as many as PROMPTS."""
    return torch.rand(len(PROMPTS), 3, size, size, generator=torch.Generator().manual_seed(seed))


def clip_words() -> CLIPTokenizer:
    """A tokenizer that spells words out letter by letter."""
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=MAX_TOKENS)


def save_clip(folder: Path, seed: int = 1, hidden_act: str = "quick_gelu") -> str:
    """Saves a CLIP model with its tokenizer; logit_scale is log(50)."""
    tokenizer = clip_words()
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 16, "hidden_act": hidden_act}
    text = {
        **sizes,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {**sizes, "hidden_size": 48, "intermediate_size": 64, "image_size": SIZE, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    enlarge(model, seed)
    model.logit_scale.data.fill_(3.912023)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_siglip(folder: Path) -> str:
    """Saves a SigLIP model; its pooled output has 24 numbers."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 40}
    vision = {**sizes, "image_size": SIZE, "patch_size": 4}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    enlarge(model, 2)
    model.save_pretrained(folder)
    return str(folder)


def save_dino(folder: Path) -> str:
    """Saves a DINOv2 model whose embedding has 24 numbers."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=84, patch_size=28))
    enlarge(model, 3)
    model.save_pretrained(folder)
    return str(folder)


def save_image_reward(folder: Path) -> str:
    """Saves ImageReward.pt with random weights, and the vocabulary."""
    torch.save(image_reward_tensors(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return str(folder)


def image_reward_tensors() -> dict[str, Tensor]:
    """Random weights by the names of ImageReward.pt."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}

    def add(name: str, *shape: int, scale: float = 1.0) -> None:
        tensors[name] = scale * torch.randn(shape, generator=generator)

    def add_linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs, scale=inputs**-0.5)
        add(f"{name}.bias", outputs, scale=0.1)

    def add_norm(name: str, width: int) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    eye = "blip.visual_encoder"
    add(f"{eye}.cls_token", 1, 1, 128)
    add(f"{eye}.pos_embed", 1, (SIZE // 4) ** 2 + 1, 128)
    add(f"{eye}.patch_embed.proj.weight", 128, 3, 4, 4, scale=0.2)
    add(f"{eye}.patch_embed.proj.bias", 128)
    for number in range(2):
        block = f"{eye}.blocks.{number}"
        add_norm(f"{block}.norm1", 128)
        add_norm(f"{block}.norm2", 128)
        add_linear(f"{block}.attn.qkv", 3 * 128, 128)
        add_linear(f"{block}.attn.proj", 128, 128)
        add_linear(f"{block}.mlp.fc1", 80, 128)
        add_linear(f"{block}.mlp.fc2", 128, 80)
    add_norm(f"{eye}.norm", 128)

    reader = "blip.text_encoder"
    tensors[f"{reader}.embeddings.position_ids"] = torch.arange(40)[None]
    add(f"{reader}.embeddings.word_embeddings.weight", len(VOCABULARY) + 2, 64)
    add(f"{reader}.embeddings.position_embeddings.weight", 40, 64)
    add_norm(f"{reader}.embeddings.LayerNorm", 64)
    for number in range(2):
        layer = f"{reader}.encoder.layer.{number}"
        for kind, inputs in (("attention", 64), ("crossattention", 128)):
            add_linear(f"{layer}.{kind}.self.query", 64, 64)
            add_linear(f"{layer}.{kind}.self.key", 64, inputs)
            add_linear(f"{layer}.{kind}.self.value", 64, inputs)
            add_linear(f"{layer}.{kind}.output.dense", 64, 64)
            add_norm(f"{layer}.{kind}.output.LayerNorm", 64)
        add_linear(f"{layer}.intermediate.dense", 80, 64)
        add_linear(f"{layer}.output.dense", 64, 80)
        add_norm(f"{layer}.output.LayerNorm", 64)
    return {**tensors, **head(64, "mlp.layers", (0, 2, 4, 6, 7))}


def save_head(file: Path, width: int, prefix: str, numbers: tuple[int, ...], seed: int = 4) -> str:
    """Saves a random head of five linear layers; the number of each in the file is among `numbers`."""
    torch.save(head(width, prefix, numbers, seed), file)
    return str(file)


def head(width: int, prefix: str, numbers: tuple[int, ...], seed: int = 4) -> dict[str, Tensor]:
    """The tensors of such a head, by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    widths = (width, 10, 8, 6, 4, 1)
    for number, inputs, outputs in zip(numbers, widths[:-1], widths[1:], strict=True):
        tensors[f"{prefix}.{number}.weight"] = torch.randn(outputs, inputs, generator=generator)
        tensors[f"{prefix}.{number}.bias"] = torch.randn(outputs, generator=generator)
    return tensors


def enlarge(model: torch.nn.Module, seed: int) -> None:
    """Makes all weights large enough that embeddings differ, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
