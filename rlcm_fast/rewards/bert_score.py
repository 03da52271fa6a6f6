"""BERTScore's recall (arXiv 1904.09675): how much of a reference an answer says, token by token.

    recall(r, a) = mean over the tokens i of r, without [CLS] and [SEP], of max over all tokens j of a of cos(r_i, a_j)

r_i and a_j are the outputs of one layer of a DeBERTa model. The layers behind it are not loaded: a network of 40 layers
gives bitwise what the 40th of 48 gives. As in the package bert_score, without idf weights and without rescaling: [CLS]
and [SEP] of the answer may be matched, those of the reference count nothing, an answer without words has recall 0.
There, padded rows set a floor of 0 below a cosine; here each text is encoded alone, so a score does not depend on its
neighbours.
"""

# L, M tokens of reference and answer, E numbers of an embedding

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rlcm_fast.rewards.facts import Part, Weights
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.towers import Tokens, load, shared

DEBERTA = Weights(
    "microsoft/deberta-xlarge-mnli",
    (
        "config.json",
        "model.safetensors|pytorch_model.bin",
        "tokenizer.json|vocab.json",
        "merges.txt?",
        "tokenizer_config.json?",
    ),
    3.04,
    "MIT",
    (Part("recall", 640.3, 21.6, "fp32"),),  # the first 40 layers, on a text of 16 tokens
)
LAYER = 40
"""The layer of deberta-xlarge-mnli that the package bert_score takes."""


class BertScore:
    """A DeBERTa model, up to one of its layers, that compares texts."""

    def __init__(self, network: nn.Module, tokens: Tokens) -> None:
        self.network = network
        self.tokens = tokens

    @staticmethod
    def of(files: ModelFiles, layer: int, place: Placement) -> BertScore:
        """Loads the model up to `layer`, or shares it with a reward that has; raises ValueError."""
        folder = files.folder()

        def make() -> BertScore:
            from transformers import AutoTokenizer, DebertaConfig, DebertaModel

            config: Any = DebertaConfig.from_pretrained(folder, local_files_only=True)
            if layer > config.num_hidden_layers:
                raise ValueError(f"layer={layer} is not there: {files.source} has {config.num_hidden_layers}")
            config.num_hidden_layers = layer
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokens = Tokens(tokenizer, config.max_position_embeddings, files.source)
            return BertScore(load(DebertaModel, folder, place, config), tokens)

        return shared(f"DeBERTa to layer {layer}", folder, place, make)

    @torch.no_grad()
    def recall(self, references: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The recall of each reference in its answer, in [-1, 1]; 0 for an answer without words.

        Each distinct text is encoded once.
        """
        known: dict[str, Tensor] = {}
        values = []
        for reference, answer in zip(references, answers, strict=True):
            if not answer.strip():
                values.append(0.0)
                continue
            for text in (reference, answer):
                if text not in known:
                    known[text] = self._embed(text)
            values.append(greedy_recall(known[reference], known[answer]).item())
        return values

    def _embed(self, text: str) -> Tensor:
        """The unit vectors (L, E) float32 of a text's tokens, with [CLS] and [SEP]."""
        device = next(self.network.parameters()).device
        ids = torch.tensor([self.tokens(text.strip())], device=device)  # (1, L)
        states = self.network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return normalize(states[0].float(), dim=-1)


def greedy_recall(reference: Tensor, answer: Tensor) -> Tensor:
    """The recall () of unit vectors (L, E) in unit vectors (M, E); the first and last of the reference do not count."""
    cosines = reference[1:-1] @ answer.T  # (L - 2, M)
    return cosines.max(dim=1).values.mean()
