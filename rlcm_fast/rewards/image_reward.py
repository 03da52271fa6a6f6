"""ImageReward (arXiv 2304.05977), the preference reward of large-scale RL for diffusion models (arXiv 2401.12244).

    (mlp(h) - 0.16717362830052426) / 1.0333394966054072      about -2.3 to 2

h is the [CLS] state of BLIP's text encoder, which reads the prompt, at most 35 tokens, and looks at the image's patches
by cross attention. So every pair of image and prompt runs through the text encoder, after the image alone has run
through the vision encoder. The mlp is five linear layers without activations.

Source and licence: THUDM/ImageReward, ImageReward.pt, Apache-2.0; of the .pt only tensors are read, never code. The
prompt is spelled by the vocabulary of bert-base-uncased. Memory: 445 M weights, 1.8 GB in fp32.
Test values: the repository's images 1.webp to 4.webp and "a painting of an ocean with clouds and birds, day time, low
depth field effect": 0.5812, 0.2745, -1.4132, -2.0296.
"""

# B images, L tokens, P patches and one, E width

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rlcm_fast.rewards.facts import Facts, Part, Weights
from rlcm_fast.rewards.heads import AffineHead, multiply_out, read_tensors
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.rewards.pixels import Preparation
from rlcm_fast.rewards.towers import Tokens, load, shared
from rlcm_fast.trajectory import Prompt

MODEL = Weights(
    "THUDM/ImageReward",
    ("ImageReward.pt",),
    1.79,
    "Apache-2.0",
    (Part("image", 303.3, 123.1), Part("pair", 142.0, 10.7)),
)
WORDS = Weights("google-bert/bert-base-uncased", ("vocab.txt", "tokenizer_config.json?"), 0.001, "Apache-2.0")
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
_HEAD_WIDTH = 64  # of each attention head, in both encoders
_LAYERS = (0, 2, 4, 6, 7)
_VISION_NAMES = (  # the original's -> BlipVisionModel's
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class Blip(nn.Module):
    """Both encoders and the head; it scores pairs of an image and a text."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: AffineHead) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The scores (B,) float32 of pixels (B, 3, size, size) and tokens (B, L), of which `mask` (B, L) counts."""
        patches = self.vision(pixel_values=pixels).last_hidden_state  # (B, P, E)
        states = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=mask.new_ones(patches.shape[:2]),
            is_decoder=False,  # else attention would be causal
        )
        return (self.head(states.last_hidden_state[:, 0]) - MEAN) / STD


class ImageReward(OnModels):
    """How people would like the image as an answer to the prompt."""

    FACTS = Facts(
        formula="an affine map of BLIP's [CLS] state of prompt and image, standardised, about -2.3 to 2",
        likes="pictures that show the prompt's things; later over-detailed, with artefacts that people dislike",
        weights=(MODEL, WORDS),
    )
    scope = "image"

    def __init__(
        self,
        model: str = MODEL.source,
        tokenizer: str = WORDS.source,
        dtype: str = "fp32",
        device: str = "same",
        batch_size: int = 32,
    ) -> None:
        """Load `model`, the .pt file, its folder or a hub id, and the vocabulary from the folder `tokenizer`."""
        self._place = Placement.of(dtype, device, batch_size)
        self._files = found(self.files({"model": model, "tokenizer": tokenizer}))
        file = self._files[0].file()
        self._blip = shared(
            "ImageReward", file, self._place, lambda: _Loaded(read_blip(read_tensors(file), self._place))
        )
        self._tokens = bert_tokens(self._files[1])

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The file of the weights and that of the vocabulary; see OnModels."""
        return [
            ModelFiles("model", arguments["model"], MODEL),
            ModelFiles("tokenizer", arguments["tokenizer"], WORDS),
        ]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1], one prompt each."""
        ids = {text: self._tokens(text) for text in dict.fromkeys(prompt.text for prompt in prompts)}
        rows = [ids[prompt.text] for prompt in prompts]
        scores = []
        for start in range(0, len(rows), self._place.batch_size):
            chunk = slice(start, start + self._place.batch_size)
            pixels = self._blip.prepare(images[chunk]).to(self._place.device, self._place.dtype)
            scores.append(self._blip.network(pixels, *_padded(rows[chunk], self._place.device)))
        return torch.cat(scores)


class _Loaded:
    """A network that several rewards may share, and how images are prepared for it."""

    def __init__(self, network: Blip) -> None:
        self.network = network
        self.prepare = Preparation(_image_size(network.vision))


def _image_size(vision: Any) -> int:
    return vision.config.image_size


def bert_tokens(files: ModelFiles) -> Tokens:
    """The tokenizer of a BERT without upper case, cut at what ImageReward reads."""
    from transformers import BertTokenizer

    return Tokens(BertTokenizer(str(files.file()), do_lower_case=True), MAX_TOKENS, "ImageReward")


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens (B, L) of rows as long as the longest, and a mask (B, L) of what counts."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([pad(torch.tensor(row), (0, longest - len(row))) for row in rows])
    mask = torch.stack([pad(torch.ones(len(row), dtype=torch.long), (0, longest - len(row))) for row in rows])
    return ids.to(device), mask.to(device)


def read_blip(tensors: Mapping[str, Tensor], place: Placement) -> Blip:
    """The network of ImageReward.pt's tensors; all sizes are their shapes. Raises ValueError for another file."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    # Sort the tensors into encoders.
    vision = {_vision_name(name): tensor for name, tensor in _below(tensors, "blip.visual_encoder.").items()}
    text = _below(tensors, "blip.text_encoder.")
    try:
        vision_config = BlipVisionConfig(**_vision_sizes(vision))
        text_config = BlipTextConfig(**_text_sizes(text))
        head = multiply_out(tensors, "mlp.layers", _LAYERS, text_config.hidden_size)
    except (KeyError, ValueError) as error:
        raise ValueError(f"model: the file is not ImageReward.pt: {error.args[0]}") from error

    # Build them.
    encoder = load(BlipVisionModel, vision, place, vision_config)
    reader = load(BlipTextModel, text, place, text_config, add_pooling_layer=False)
    return Blip(encoder, reader, head.to(place.device)).eval()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _vision_name(name: str) -> str:
    """The name in BlipVisionModel of a tensor of the original vision encoder."""
    for pattern, ours in _VISION_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _vision_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of BlipVisionConfig that fit tensors by their names in BlipVisionModel."""
    width, _, _, patch = tensors["embeddings.patch_embedding.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": _num_layers(tensors, "encoder.layers."),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "patch_size": patch,
        "image_size": patch * round((tensors["embeddings.position_embedding"].shape[1] - 1) ** 0.5),
        "layer_norm_eps": 1e-6,  # not the default of transformers
    }


def _text_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of BlipTextConfig that fit tensors by their names in BlipTextModel."""
    vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "intermediate_size": len(tensors["encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": _num_layers(tensors, "encoder.layer."),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": len(tensors["embeddings.position_embeddings.weight"]),
        "is_decoder": True,  # else there would be no cross attention
    }


def _num_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
