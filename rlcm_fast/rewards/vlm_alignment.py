"""Lets a vision-language model describe the picture and measures how much of the prompt it says: RLCM's alignment.

    answer = captioner(picture, "Answer concisely: what is going on in this image?")
    score  = BERTScore recall of "The image contains " + prompt in answer          captions.py, bert_score.py

It is the task of DDPO (arXiv 2305.13301) and RLCM (arXiv 2404.03673). An answer without words scores 0: that is a
score. A captioner that fails gives no score. Unrelated texts have about 0.52 already, and the scores are not rescaled.

Differences from DDPO's server:
1. The captioner is LLaVA 1.5, or any model on a server; theirs was the first LLaVA, with another way to ask.
2. LLaVA's picture is prepared on tensors, by bicubic with antialias (pixels.py).
3. Each text is encoded without padding, and a cosine below 0 stays below 0 (bert_score.py).

Source and licence: llava-hf/llava-1.5-7b-hf, 7,063 M weights, 14.1 GB in fp16, Llama 2 community licence;
microsoft/deberta-xlarge-mnli, 640 M weights in 40 layers, always in fp32, 2.6 GB, MIT. RLCM's code has no licence and
is not used. Test values of bert_score's own, for RoBERTa large and layer 17: recall 0.98238, 0.97329, 0.92043.
"""

# B images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlcm_fast.rewards.bert_score import DEBERTA, LAYER, BertScore
from rlcm_fast.rewards.captions import LLAVA, Llava, RemoteCaptioner
from rlcm_fast.rewards.encoding import to_pictures
from rlcm_fast.rewards.endpoint import Calls, check_whole
from rlcm_fast.rewards.facts import Facts
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.rewards.outcomes import Failed, scores_of
from rlcm_fast.trajectory import Prompt

REFERENCE = "The image contains "
_AT_ONCE = 8  # captions at a time by LLaVA: 8 x 665 tokens of keys and values are 2.8 GB in fp16
_OF_A_SERVER = ("url", "model", "calls")


class VlmAlignment(OnModels):
    """How much of the prompt a vision-language model says of the picture, about 0.5 to 1."""

    scope = "image"
    FACTS = Facts(
        formula='BERTScore recall of "The image contains " + prompt in the caption',
        likes="what the captioner names first; a picture may show little more than the words of the prompt",
        weights=(LLAVA, DEBERTA),
    )

    def __init__(
        self,
        captioner: str | Mapping[str, Any] = LLAVA.source,
        scorer: str = DEBERTA.source,
        layer: int = LAYER,
        dtype: str = "fp16",
        device: str = "same",
    ) -> None:
        """Load both models.

        captioner: a LLaVA 1.5 folder or hub id, or {url, model, calls} of an OpenAI-compatible endpoint. scorer: a
        DeBERTa folder or hub id, whose output of `layer` counts. dtype: of LLaVA; on a CPU take fp32.
        """
        arguments = {"captioner": captioner, "scorer": scorer, "layer": layer}
        self._files = found(self.files(arguments))
        files = {of_model.field: of_model for of_model in self._files}
        self._scorer = BertScore.of(files["scorer"], layer, Placement.of("fp32", device, _AT_ONCE))
        self._remote = dict(captioner) if isinstance(captioner, Mapping) else {}
        self.asks_server = bool(self._remote)
        place = Placement.of(dtype, device, _AT_ONCE)
        self._captioner = RemoteCaptioner(**self._remote) if self._remote else Llava.of(files["captioner"], place)

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the scorer, and of the captioner unless it is on a server; see OnModels."""
        captioner = arguments["captioner"]
        check_whole("layer", arguments["layer"])
        of_scorer = ModelFiles("scorer", arguments["scorer"], DEBERTA)
        if isinstance(captioner, Mapping):
            _check_server(captioner)
            return [of_scorer]
        return [ModelFiles("captioner", captioner, LLAVA), of_scorer]

    @property
    def used(self) -> dict[str, Any]:
        """The files of the models, and the server of the captioner if it has one, as JSON."""
        of_server = {"captioner": {key: self._remote[key] for key in ("url", "model")}} if self._remote else {}
        return {**super().used, **of_server}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1], one prompt each."""
        captions = self._captioner(to_pictures(images))
        answers = ["" if isinstance(caption, Failed) else caption for caption in captions]
        recalls = self._scorer.recall([REFERENCE + prompt.text for prompt in prompts], answers)
        pairs = zip(captions, recalls, strict=True)
        return scores_of([caption if isinstance(caption, Failed) else recall for caption, recall in pairs])


def _check_server(captioner: Mapping[str, Any]) -> None:
    """Raises ValueError unless the mapping says where the captioner is."""
    unknown = [str(key) for key in captioner if key not in _OF_A_SERVER]
    if unknown:
        raise ValueError(f"captioner.{unknown[0]} is unknown; captioner takes {', '.join(_OF_A_SERVER)}")
    missing = [key for key in ("url", "model") if not captioner.get(key)]
    if missing:
        raise ValueError(f"captioner has no {missing[0]}; give {{url: http://HOST:PORT/v1, model: NAME}}, or a folder")
    Calls.of(captioner.get("calls"))
