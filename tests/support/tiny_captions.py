"""Small random models in the layouts of DeBERTa and LLaVA 1.5, with tokenizers that spell words letter by letter."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_rewards import enlarge
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    DebertaConfig,
    DebertaModel,
    DebertaTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

ENDS = (2, *range(5, 60, 6))  # tokens that end a caption of the small LLaVA, so that it is short
_LETTERS = "abcdefghijklmnopqrstuvwxyzTAUSERINQ0123456789.,:?"
_SPACE = "\u0120"  # of byte-level BPE


def save_deberta(folder: Path, num_layers: int = 3) -> str:
    """Saves a DeBERTa model with relative attention and its tokenizer; texts have 48 tokens at most."""
    special = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    tokens = [*special, *dict.fromkeys(_LETTERS + "he"), _SPACE, "he", f"{_SPACE}t"]
    merges = [("h", "e"), (_SPACE, "t")]
    tokenizer = DebertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    torch.manual_seed(3)
    config = DebertaConfig(
        vocab_size=len(tokens),
        hidden_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=40,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
        max_position_embeddings=48,
        max_relative_positions=-1,
        pad_token_id=3,
    )
    model = DebertaModel(config)
    enlarge(model, 3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_llava(folder: Path) -> str:
    """Saves a LLaVA model that sees 9 patches of 12 pixels, and its tokenizer."""
    special = ["<unk>", "<s>", "</s>", "<image>"]
    tokens = [*special, *dict.fromkeys(_LETTERS + "\n "), "ing"]
    spelled = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    spelled.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spelled, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=["<image>"]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    text = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=12, patch_size=4
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    enlarge(model, 5)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = list(ENDS)
    model.save_pretrained(folder)
    return str(folder)
