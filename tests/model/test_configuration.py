from __future__ import annotations

import pytest
from transformers import AutoConfig

from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.model.tokenizer import train_tokenizer


def test_official_defaults(recipe):
    config = KimiVLConfig(**recipe("kimi_vl_a3b"))
    text = config.text_config
    assert text.model_type == "deepseek_v3" and text.num_nextn_predict_layers == 0
    assert text.rope_parameters["rope_theta"] == 800000.0
    assert (text.qk_head_dim, text.v_head_dim) == (192, 128)
    assert config.vision_config.hidden_size // config.vision_config.num_attention_heads == 72


def test_round_trip(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, KimiVLConfig)
    assert again.to_dict() == tiny_config.to_dict()
    assert "model_type" not in again.to_dict()["text_config"]


def test_vocabulary_comes_from_the_tokenizer(recipe):
    config = KimiVLConfig(**recipe("tiny"))
    with pytest.raises(ValueError, match="with_tokenizer"):
        KimiVLForConditionalGeneration(config)
    tokenizer = train_tokenizer(["What is the sum of 3 and 4? 7."] * 4, vocab_size=320)
    filled = config.with_tokenizer(tokenizer)
    assert filled.vocab_size == filled.text_config.vocab_size == len(tokenizer)
    assert filled.media_placeholder_token_id == tokenizer.convert_tokens_to_ids("<|media_pad|>")
    assert filled.text_config.pad_token_id == tokenizer.pad_token_id
    assert config.vocab_size is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"topk_method": "greedy"}}, "text_config.topk_method"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type"),
        ({"text_config": {"vocab_size": 10}, "vocab_size": 12}, "vocab_size 12"),
        ({"vision_config": {"model_type": "clip"}}, "vision_config.model_type"),
        ({"vision_config": {"hidden_size": 90, "num_attention_heads": 15}}, "multiple of 4"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_wrong_keys_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        KimiVLConfig(**change)
