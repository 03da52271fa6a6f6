"""What is known of a reward on a model before it is loaded: formula, files, sizes, licence, what to install.

Every such reward has a class attribute FACTS. docs/rewards_models.md, `rlcm-fast plan` and `rlcm-fast doctor` read it.
This file imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

OPTIONAL = "?"
EITHER = "|"
SHARDS = "model.safetensors|model.safetensors.index.json|pytorch_model.bin"
"""Usual names of a model's weights: one file, an index of several, or an old file, of which only tensors are read."""
CLIP_WORDS = ("tokenizer.json|vocab.json", "merges.txt?", "tokenizer_config.json?", "special_tokens_map.json?")
"""The usual names of the files of a CLIP tokenizer."""


@dataclass(frozen=True)
class Part:
    """One network of a model, as large as it is in the model's default."""

    name: str  # image, text, ...
    million_parameters: float  # held in memory; times 4 bytes in fp32, 2 in bf16 and fp16
    gflops: float  # one forward pass on one image, or on one prompt of 16 tokens, of multiplications and additions
    dtype: str = ""  # fp32, if the network always runs in it; empty: in the one that an argument of the reward names


@dataclass(frozen=True)
class Weights:
    """The files of one model on which a reward computes."""

    source: str  # hub id of the default; empty if you must name a file
    files: tuple[str, ...]  # needed names; "a|b": either of them; "a?": only if it is there
    gigabytes: float  # to download
    licence: str
    parts: tuple[Part, ...] = ()  # none for small files
    where: str = "the Hugging Face hub"  # where the files come from


@dataclass(frozen=True)
class Facts:
    """What a user should know of a reward before its models load."""

    formula: str  # one line
    likes: str  # what scores well, and how a trained model exploits it
    weights: tuple[Weights, ...]
    extra: str = ""  # the extra of setup.py that it needs; empty: none

    @property
    def gigabytes(self) -> float:
        """The size of all downloads, in GB."""
        return sum(weights.gigabytes for weights in self.weights)

    @property
    def million_parameters(self) -> float:
        """Number of weights in memory, in millions."""
        return sum(part.million_parameters for weights in self.weights for part in weights.parts)
