"""Configuration of Kimi-VL: a MoonViT vision tower and a DeepSeek-V3-style language model.

`config.json` is read and written in the official shape: `text_config` carries no `model_type`, RoPE is given as
`rope_theta` and `rope_scaling`, the precision as `torch_dtype` (Kimi-VL technical report, arXiv 2504.07491).
"""

from __future__ import annotations

import copy
from typing import Any

import transformers
from transformers import DeepseekV3Config, PreTrainedConfig, PreTrainedTokenizerBase

# What the official text_config says beside the sizes. The decoder implements exactly these choices, so another
# value in a file is an error, not something to ignore.
_TEXT_CONSTANTS: dict[str, Any] = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}
_TEXT_DEFAULTS: dict[str, Any] = {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "rope_theta": 800000.0,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
_EXPERT_SIZES = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
# Derived by transformers, or not in the official file.
_TEXT_NOT_WRITTEN = {"head_dim", "qk_head_dim", "rope_parameters", "rope_interleave", "model_type"}
_TEXT_NOT_WRITTEN |= {"num_nextn_predict_layers", "num_mtp_layers", "pretraining_tp", "output_router_logits"}


class MoonViTConfig(PreTrainedConfig):
    """Sizes of the vision tower. The defaults are the official ones."""

    model_type = "moonvit"
    base_config_key = "vision_config"

    patch_size: int = 14
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64
    merge_kernel_size: list[int] | tuple[int, ...] = (2, 2)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                f"vision_config: hidden_size {self.hidden_size} over num_attention_heads "
                f"{self.num_attention_heads} must give a multiple of 4 (2-D RoPE turns channel pairs for x and y)"
            )


class KimiVLConfig(PreTrainedConfig):
    """Configuration of `KimiVLForConditionalGeneration`.

    `vision_config` and `text_config` may be dictionaries. `vocab_size` and the special ids may be null in a recipe
    for a new model; `with_tokenizer` fills them before the model is built.
    """

    model_type = "kimi_vl"
    sub_configs = {"text_config": DeepseekV3Config, "vision_config": MoonViTConfig}

    text_config: Any = None  # given as a dictionary or not at all, a DeepseekV3Config afterwards
    vision_config: Any = None  # the same, a MoonViTConfig
    vocab_size: int | None = None
    media_placeholder_token_id: int | None = 163605
    ignore_index: int = -100
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _vision_config(self.vision_config)
        self.text_config, text_vocab = _text_config(self.text_config)
        if self.vocab_size is None:
            self.vocab_size = text_vocab
        elif text_vocab not in (None, self.vocab_size):
            raise ValueError(f"vocab_size {self.vocab_size} and text_config.vocab_size {text_vocab} differ")
        if self.vocab_size is not None:
            self.text_config.vocab_size = self.vocab_size
        if self.tie_word_embeddings or self.text_config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: Kimi-VL has its own lm_head; set it to false")
        if not getattr(self, "architectures", None):
            self.architectures = ["KimiVLForConditionalGeneration"]
        super().__post_init__(**kwargs)

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> KimiVLConfig:
        """A copy whose vocabulary size and special ids are those of `tokenizer`."""
        config = copy.deepcopy(self)
        config.vocab_size = len(tokenizer)
        config.text_config.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config.text_config, name, getattr(tokenizer, name))
        media = tokenizer.convert_tokens_to_ids("<|media_pad|>")
        if media is None or media == tokenizer.unk_token_id:
            raise ValueError("the tokenizer has no <|media_pad|>; make it with kimivl.model.tokenizer")
        config.media_placeholder_token_id = media
        return config

    def to_dict(self) -> dict[str, Any]:
        """The official `config.json`, as a dictionary (what transformers adds for itself is left out)."""
        output = _without_defaults(super().to_dict())
        output.pop("auto_map", None)  # the classes are transformers-registered: no code travels with a checkpoint
        output["text_config"] = _official_text(self.text_config)
        output["vision_config"] = _without_defaults(self.vision_config.to_dict())
        output["model_type"] = self.model_type
        output["transformers_version"] = transformers.__version__
        output["tie_word_embeddings"] = False
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """The whole official file: a key equal to a default of today's transformers is still written."""
        return self.to_dict()


def _vision_config(given: dict[str, Any] | PreTrainedConfig | None) -> MoonViTConfig:
    if isinstance(given, PreTrainedConfig):
        if not isinstance(given, MoonViTConfig):
            raise ValueError(f"vision_config: expected moonvit, got {given.model_type!r}")
        return given
    fields = dict(given or {})
    model_type = fields.pop("model_type", "moonvit")
    if model_type != "moonvit":
        raise ValueError(f"vision_config.model_type: expected moonvit, got {model_type!r}")
    return MoonViTConfig(**fields)


def _text_config(given: dict[str, Any] | PreTrainedConfig | None) -> tuple[DeepseekV3Config, int | None]:
    """The decoder's configuration, and its vocabulary size where one was given."""
    if isinstance(given, PreTrainedConfig):
        if not isinstance(given, DeepseekV3Config):
            raise ValueError(f"text_config: expected deepseek_v3, got {given.model_type!r}")
        return given, given.vocab_size
    fields = _TEXT_CONSTANTS | _TEXT_DEFAULTS | dict(given or {})
    model_type = fields.pop("model_type", "deepseek_v3")
    if model_type != "deepseek_v3":
        raise ValueError(f"text_config.model_type: expected deepseek_v3, got {model_type!r}")
    for key, value in _TEXT_CONSTANTS.items():
        if fields[key] != value:
            raise ValueError(f"text_config.{key}: only {value!r} is Kimi-VL's, got {fields[key]!r}")
    if fields.get("vocab_size") is None:
        fields.pop("vocab_size", None)  # not known yet: transformers wants a number, with_tokenizer brings it
    _check_experts(fields)
    return DeepseekV3Config(**fields), fields.get("vocab_size")


def _check_experts(fields: dict[str, Any]) -> None:
    """ValueError, one line, for a choice of experts that cannot be made."""
    whole = {key: value for key, value in vars(DeepseekV3Config()).items() if key in _EXPERT_SIZES} | fields
    experts, chosen, groups, kept = (whole[key] for key in _EXPERT_SIZES)
    if groups < 1 or experts % groups or experts < 2 * groups:
        raise ValueError(
            f"text_config.n_routed_experts {experts} must be a multiple of n_group {groups}, with 2 or more in a group"
        )
    if not 1 <= kept <= groups:
        raise ValueError(f"text_config.topk_group {kept} must be from 1 to n_group {groups}")
    if not 1 <= chosen <= kept * experts // groups:
        raise ValueError(
            f"text_config.num_experts_per_tok {chosen} must be from 1 to the {kept * experts // groups} experts to "
            f"choose from (n_routed_experts {experts}, in {kept} of {groups} groups)"
        )
    if whole.get("hidden_act", "silu") != "silu":
        raise ValueError(f"text_config.hidden_act: only 'silu' is Kimi-VL's, got {whole['hidden_act']!r}")


def _official_text(text: PreTrainedConfig) -> dict[str, Any]:
    fields = _without_defaults(text.to_dict())
    rope = dict(text.rope_parameters)
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    fields["tie_word_embeddings"] = False
    for key in _TEXT_NOT_WRITTEN:
        fields.pop(key, None)
    return fields


def _without_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop what every transformers configuration has and this one does not change; `dtype` -> `torch_dtype`."""
    defaults = PreTrainedConfig().to_dict()
    kept = {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}
    kept.pop("_name_or_path", None)
    if (dtype := kept.pop("dtype", None)) is not None:
        kept["torch_dtype"] = dtype
    return kept
