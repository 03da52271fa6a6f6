"""The tokenizer made from the grammar."""

from __future__ import annotations

import pytest

from rlcm_fast.shapes.grammar import COLOURS, RELATIONS, SHAPES, two_shape_captions
from rlcm_fast.shapes.pretrain.text import MAX_TOKENS, new_text_encoder, new_tokenizer, tokenize

WORDS = sorted({"a", *COLOURS, *SHAPES, *(word for relation in RELATIONS for word in relation.split())})


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_grammar_is_one_token(word: str):
    assert len(new_tokenizer()(word).input_ids) == 1 + 2, "start, the word, end"


def test_no_caption_is_cut_off():
    tokenizer = new_tokenizer()
    captions = [str(caption) for held_out in (False, True) for caption in two_shape_captions(held_out)]
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= MAX_TOKENS
    assert len(tokenize(tokenizer, captions).unique(dim=0)) == len(captions)


def test_the_text_encoder_knows_the_tokenizers_special_tokens():
    tokenizer = new_tokenizer()
    config = new_text_encoder(tokenizer).config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert config.pad_token_id == tokenizer.pad_token_id
