"""Encodes texts as the pipelines of diffusers do, and texts that are too long for them in chunks.

    text -> token ids -> one piece, or chunks (chunks.py) -> each piece encoded apart -> Encoding

A text encoder of CLIP takes 77 tokens: a begin, 75 of the text, an end. Longer texts are cut, or encoded in chunks that
lie one behind the other on the axis of tokens. SDXL's pooled embedding is that of the first chunk, as in A1111 and
ComfyUI.

All encodings of a run have one length, because a compiled graph wants it. So the chunks of a shorter text are repeated,
as ComfyUI does: attention weighs a token by its share of a sum of exponentials, and the shares of k copies add up to
that of the original. A text's images depend neither on its company nor on `prompts.max_chunks`.

The encoders are called here, not by `encode_prompt`: it cuts long texts, and its `clip_skip` fails where transformers'
CLIPTextModel has no `text_model` (version 5).
"""

# R rows of token ids, L tokens of a piece, T tokens of an encoding, E embedding, P pooled embedding

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlcm_fast.backbones.chunks import Split, Splitter
from rlcm_fast.config import PromptsConfig

_MOST_COUNTED = 100_000  # distinct texts that are counted before one is cut


@dataclass(frozen=True)
class Encoding:
    """Encoding of one text, on the device."""

    embeds: Tensor  # (T, E), not yet repeated; SDXL's two encoders side by side
    pooled: Tensor | None  # (P,), only from SDXL's second encoder


@dataclass(frozen=True)
class TextSettings:
    """How texts are read."""

    clip_skip: int | None = None
    prompts: PromptsConfig = field(default_factory=PromptsConfig)


class CutTexts:
    """Counts texts that are cut, and says so once."""

    def __init__(self, limit: str, way_out: str) -> None:
        """limit: what a text is too long for, in words; way_out: the setting that reads more."""
        self.tell: Callable[[str], None] = lambda line: None  # is given the line; build.py and the tools replace it
        self._limit, self._way_out = limit, way_out
        self._seen: set[int] = set()
        self._num_cut = self._longest = 0
        self._example = ""
        self._is_said = False

    def note(self, text: str, splits: Sequence[Split]) -> None:
        """Counts a text that the encoders split like this; does nothing if it was counted before."""
        key = hash(text)
        if self._is_said or key in self._seen:
            return
        if len(self._seen) < _MOST_COUNTED:
            self._seen.add(key)
        num_tokens = max(split.num_tokens for split in splits)
        if any(split.is_cut for split in splits):
            self._num_cut += 1
            if num_tokens > self._longest:
                self._longest, self._example = num_tokens, text

    def say(self) -> None:
        """Tells how many of the texts so far are cut, if any is; only once."""
        if self._is_said or not self._num_cut:
            return
        self._is_said = True
        example = " ".join(self._example.split())[:40]
        self.tell(
            f"{self._num_cut} of {len(self._seen)} distinct prompts are too long for {self._limit}, and are cut; the "
            f"longest has {self._longest}: '{example}...'; {self._way_out}"
        )


class TextEncoder:
    """The text encoder of a pipeline, or SDXL's two, with their tokenizers."""

    def __init__(self, pipeline: Any, device: torch.device, settings: TextSettings | None = None) -> None:
        # Collect the parts.
        self._settings = settings or TextSettings()
        self._device = device
        self._pipeline = pipeline
        parts = pipeline.components
        self._is_sdxl = "text_encoder_2" in parts
        self._empty: Encoding | None = None
        ends = ("", "_2") if self._is_sdxl else ("",)
        self._encoders: list[Any] = [parts[f"text_encoder{end}"] for end in ends]
        prompts = self._settings.prompts
        self._splitters = [Splitter(parts[f"tokenizer{end}"], prompts.num_chunks) for end in ends]

        # Say in words what is cut.
        size = self._splitters[0].size
        if prompts.long == "chunks":
            limit, way_out = f"{prompts.num_chunks} chunks of {size} tokens", "raise prompts.max_chunks to read more"
        else:
            limit, way_out = f"the {size} tokens of a text encoder", "prompts.long=chunks reads more"
        self.cut = CutTexts(limit, way_out)

    @property
    def is_plain(self) -> bool:
        """Tells whether texts are read as by `encode_prompt` of the pipeline without any settings."""
        return self._settings == TextSettings()

    def survey(self, texts: Sequence[str]) -> None:
        """Says how many of texts that will be drawn, and of the negative prompt, are cut; encodes nothing."""
        negative = self._settings.prompts.negative
        distinct = list(dict.fromkeys([*texts, negative] if negative else texts))
        self._note(distinct, self._splits(distinct))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodes prompts, all in one batch."""
        splits = self._splits(texts)
        self._note(texts, splits)
        return self._encoded(splits, self._settings.clip_skip)

    def negative(self) -> Encoding:
        """Encodes what guidance leads away from: the negative prompt, or what stands for none.

        Like the pipelines of diffusers it skips no layers.
        """
        negative = self._settings.prompts.negative
        if not negative:
            return self.empty()
        splits = self._splits([negative])
        self._note([negative], splits)
        return self._encoded(splits, None)[0]

    def empty(self) -> Encoding:
        """Encodes the empty text, or zeros if an SDXL folder asks for them; once in a run."""
        if self._empty is None:
            (self._empty,) = self._encoded(self._splits([""]), None)
            if self._is_sdxl and self._pipeline.config.force_zeros_for_empty_prompt:
                pooled = None if self._empty.pooled is None else torch.zeros_like(self._empty.pooled)
                self._empty = Encoding(torch.zeros_like(self._empty.embeds), pooled)
        return self._empty

    def stacked(self, encodings: Sequence[Encoding]) -> tuple[Tensor, Tensor | None]:
        """Stacks N encodings, repeated to one length, and their pooled embeddings: (N, T, E), and (N, P) or None."""
        length = self._settings.prompts.encoded_chunks * self._splitters[0].length
        embeds = [encoding.embeds.repeat(length // len(encoding.embeds), 1) for encoding in encodings]
        pooled = [encoding.pooled for encoding in encodings if encoding.pooled is not None]
        return torch.stack(embeds), torch.stack(pooled) if pooled else None

    def _splits(self, texts: Sequence[str]) -> list[list[Split]]:
        """Splits each text for each encoder; writes out textual inversions of several vectors: <cat> <cat>_1."""
        by_encoder = []
        for splitter in self._splitters:
            pipeline, is_plain = self._pipeline, not splitter.joined
            written = list(texts) if is_plain else pipeline.maybe_convert_prompt(list(texts), splitter.tokenizer)
            by_encoder.append(splitter.splits(written))
        return [list(of_text) for of_text in zip(*by_encoder, strict=True)]

    def _note(self, texts: Sequence[str], splits: Sequence[Sequence[Split]]) -> None:
        for text, of_text in zip(texts, splits, strict=True):
            self.cut.note(text, of_text)
        self.cut.say()

    @torch.no_grad()
    def _encoded(self, splits: Sequence[Sequence[Split]], clip_skip: int | None) -> list[Encoding]:
        """Encodes all pieces of all texts as rows of one batch, and puts those of a text one behind the other."""
        # Run the encoders on as many pieces of a text each: an empty one stands in where one has fewer.
        counts = [max(len(split.pieces) for split in of_text) for of_text in splits]
        embeds, pooled = [], None
        for number, (encoder, splitter) in enumerate(zip(self._encoders, self._splitters, strict=True)):
            rows = []
            for of_text, count in zip(splits, counts, strict=True):
                pieces = of_text[number].pieces
                rows += [splitter.row(piece) for piece in [*pieces, *[[]] * (count - len(pieces))]]
            states, of_rows = self._run(encoder, rows, clip_skip)
            embeds.append(states)
            pooled = of_rows if pooled is None else pooled
        joined = torch.cat(embeds, dim=-1).to(self._encoders[-1].dtype)  # (R, L, E)

        # Share the rows out to the texts.
        firsts = torch.tensor([0, *counts]).cumsum(0)[:-1].tolist()
        return [
            Encoding(part.flatten(0, 1), None if pooled is None else pooled[first])
            for part, first in zip(joined.split(counts), firsts, strict=True)
        ]

    def _run(
        self, encoder: Any, rows: Sequence[tuple[list[int], list[int]]], clip_skip: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the states (R, L, E) that the UNet reads, and pooled embeddings (R, P) of SDXL's second encoder."""
        ids = torch.tensor([ids for ids, _ in rows], device=self._device)
        if self._is_sdxl:
            output = encoder(ids, output_hidden_states=True)
            return output.hidden_states[-2 - (clip_skip or 0)], output[0] if output[0].ndim == 2 else None
        wants_mask = getattr(encoder.config, "use_attention_mask", False)  # a field that some configs have
        mask = torch.tensor([mask for _, mask in rows], device=self._device) if wants_mask else None
        if clip_skip is None:
            return encoder(ids, attention_mask=mask)[0], None
        states = encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1 - clip_skip]
        inner = getattr(encoder, "text_model", encoder)  # transformers before version 5 has one more module
        return inner.final_layer_norm(states), None
