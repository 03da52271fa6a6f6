"""Makes a CLIP tokenizer with one token per word of the grammar, and a small CLIP text encoder."""

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
    """A tokenizer whose byte-pair merges make each word of the grammar one token; it spells other words in pieces."""
    # Begin with single letters, inside and at the end of a word.
    words = sorted({"a", *COLOURS, *SHAPES, *(word for relation in RELATIONS for word in relation.split())})
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = dict.fromkeys(letters + [f"{letter}</w>" for letter in letters])
    merges: list[tuple[str, str]] = []

    # Add the merges that each word still needs.
    for word in words:
        pieces = _apply(merges, [*word[:-1], f"{word[-1]}</w>"])
        while len(pieces) > 1:  # new merges come last in rank, so the words before this one stay one token
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens[pieces[0]] = None
    vocabulary: Any = {token: index for index, token in enumerate([*tokens, _START, _END])}
    pairs: Any = merges
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=MAX_TOKENS)


def _apply(merges: list[tuple[str, str]], pieces: list[str]) -> list[str]:
    """Encode byte pairs: apply each merge in the order of rank, wherever it fits."""
    for first, second in merges:
        index = 0
        while index < len(pieces) - 1:
            if (pieces[index], pieces[index + 1]) == (first, second):
                pieces = [*pieces[:index], first + second, *pieces[index + 2 :]]
            index += 1
    return pieces


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A new text encoder of two layers and width 128; the teacher trains it."""
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
    """The token ids (N, MAX_TOKENS) int64, padded as in diffusers' pipelines."""
    batch = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return torch.as_tensor(batch.input_ids)
