"""Describes pictures in words: by a LLaVA model here, or by any vision-language model on a server.

Both ask the question of DDPO and RLCM about the picture as a JPEG of quality 80, and answer greedily with at most 64
tokens; a longer answer is cut. Captions of different models do not compare, nor do rewards that are made of them.
"""

# B images

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rlcm_fast.rewards.chat import Chat, Question
from rlcm_fast.rewards.encoding import from_pixels, jpeg_url
from rlcm_fast.rewards.endpoint import BadAnswer
from rlcm_fast.rewards.facts import SHARDS, Part, Weights
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.outcomes import Failed
from rlcm_fast.rewards.pixels import Preparation
from rlcm_fast.rewards.towers import load, shared

QUESTION = "Answer concisely: what is going on in this image?"
JPEG_QUALITY = 80
MAX_TOKENS = 64
LLAVA = Weights(
    "llava-hf/llava-1.5-7b-hf",
    ("config.json", SHARDS, "tokenizer.json", "tokenizer_config.json?", "special_tokens_map.json?"),
    14.1,
    "Llama 2 community licence",
    (Part("caption", 7063.4, 9267.8),),  # 576 tokens of the picture, 25 of the question and 64 of the answer
)


class RemoteCaptioner:
    """A vision-language model on a server."""

    def __init__(self, url: str, model: str, calls: Mapping[str, Any] | None = None) -> None:
        """Ask the server at `url` (http://HOST:PORT/v1) whether it serves `model`; raises ValueError."""
        self._chat = Chat(url, model, calls)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str | Failed]:
        """The caption of each picture, or why there is none."""
        questions = [
            Question(QUESTION, lambda picture=picture: jpeg_url(picture, JPEG_QUALITY)) for picture in pictures
        ]
        return self._chat.ask_all(questions, {"max_tokens": MAX_TOKENS, "temperature": 0}, _caption)


class Llava:
    """A LLaVA 1.5 model in transformers' layout."""

    def __init__(self, network: nn.Module, tokenizer: Any, place: Placement) -> None:
        self._network: Any = network
        self._tokenizer = tokenizer
        self._place = place
        self._prepare = Preparation(self._network.config.vision_config.image_size)
        self._ids = _question_ids(tokenizer, self._network.config)
        self._lock = threading.Lock()  # keys and values of one batch at a time

    @staticmethod
    def of(files: ModelFiles, place: Placement) -> Llava:
        """Loads the model, or shares it with a reward that has."""
        folder = files.folder()

        def make() -> Llava:
            from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

            config = LlavaConfig.from_pretrained(folder, local_files_only=True)
            network = load(LlavaForConditionalGeneration, folder, place, config)
            return Llava(
                network, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), place
            )

        return shared("LLaVA", folder, place, make)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str | Failed]:
        """The caption of each picture; pictures have one size."""
        images = from_pixels(np.stack([np.array(through_jpeg(picture)) for picture in pictures]))
        captions: list[str | Failed] = []
        for chunk in images.split(self._place.batch_size):
            captions += self._captions(chunk)
        return captions

    @torch.no_grad()
    def _captions(self, images: Tensor) -> list[str]:
        """The captions of images (B, 3, H, W) in [0, 1]."""
        device, dtype = self._place.device, self._place.dtype
        pixels = self._prepare(images.to(device)).to(dtype)
        ids = torch.tensor(self._ids, device=device).expand(len(images), -1)
        with self._lock:
            answers = self._network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                pad_token_id=self._tokenizer.eos_token_id,
            )
        words = self._tokenizer.batch_decode(answers[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in words]


def through_jpeg(picture: Image.Image) -> Image.Image:
    """The picture as a server gets it: after a JPEG of quality 80."""
    data = base64.b64decode(jpeg_url(picture, JPEG_QUALITY).partition(",")[2])
    return Image.open(BytesIO(data))


def _question_ids(tokenizer: Any, config: Any) -> list[int]:
    """The tokens of the question in the words of LLaVA 1.5, with as many for the picture as its tower gives vectors."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    num_vectors = side**2 + (config.vision_feature_select_strategy == "full")
    ids = list(tokenizer(f"USER: <image>\n{QUESTION} ASSISTANT:")["input_ids"])
    if ids.count(config.image_token_id) != 1:
        raise ValueError("the tokenizer does not know <image>, the place of a picture; give a LLaVA 1.5 model")
    place = ids.index(config.image_token_id)
    return [*ids[:place], *[config.image_token_id] * num_vectors, *ids[place + 1 :]]


def _caption(choice: Mapping[str, Any]) -> str:
    try:
        text = choice["message"]["content"]
    except (KeyError, TypeError) as error:
        raise BadAnswer("answered a choice without message.content") from error
    if not isinstance(text, str):
        raise BadAnswer("answered a choice without text")
    return text.strip()
