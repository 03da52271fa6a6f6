"""A CLIP tokenizer whose merges spell the grammar's words, one token a word, and a small CLIP text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlcm_fast.shapes.grammar import COLOURS, RELATIONS, SHAPES

MAX_TOKENS = 12  # the longest caption has 8 words, plus start and end
EMBEDDING_SIZE = 128
_START, _END = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges that build each word from its letters; other words are spelt by their letters."""
    words = sorted({"a", *COLOURS, *SHAPES, *(word for relation in RELATIONS for word in relation.split())})
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = dict.fromkeys(letters + [f"{letter}</w>" for letter in letters])
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        prefix = pieces[0]
        for piece in pieces[1:]:
            merges[prefix, piece] = None
            prefix += piece
            tokens[prefix] = None
    vocabulary: Any = {token: index for index, token in enumerate([*tokens, _START, _END])}
    pairs: Any = list(merges)
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 128; trained together with the teacher."""
    special: dict[str, Any] = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {"bos": _START, "eos": _END, "pad": _END}.items()
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=EMBEDDING_SIZE,
        intermediate_size=2 * EMBEDDING_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=EMBEDDING_SIZE,
        **special,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, MAX_TOKENS) int64, padded as diffusers' pipelines do."""
    batch = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return torch.as_tensor(batch.input_ids)
