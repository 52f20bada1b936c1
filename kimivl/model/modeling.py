"""Kimi-VL: vision tower -> projector -> language model (arXiv 2504.07491).

The decoder is transformers' native DeepseekV3ForCausalLM. A training batch is one packed row: `cu_seqlens` says
where its samples begin and end, and attention stays inside a sample.
Legend: B rows, L row length, T packed tokens, S segments (samples), P patches, M image tokens, K targets, D width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, DeepseekV3ForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from kimivl.model.attention import SEGMENT_ATTENTION, install
from kimivl.model.cache import SlotCache, decoding_cache
from kimivl.model.configuration import KimiVLConfig
from kimivl.model.experts import implementation
from kimivl.model.kernels import Kernels
from kimivl.model.loss import linear_log_probs, make_logits_in_float32
from kimivl.model.official import OfficialFormat
from kimivl.model.processor import normalise
from kimivl.model.projector import MultiModalProjector
from kimivl.model.replay import check_routing, install_replay
from kimivl.model.router import route_in_float32
from kimivl.model.segments import Segments
from kimivl.model.vision import MoonViT


class KimiVLForConditionalGeneration(OfficialFormat, PreTrainedModel, GenerationMixin):
    """The model of all three stages; on disk it has the official tensor names."""

    config_class = KimiVLConfig
    config: KimiVLConfig
    vision_tower: MoonViT
    multi_modal_projector: MultiModalProjector
    language_model: DeepseekV3ForCausalLM
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _no_split_modules = ["DeepseekV3DecoderLayer", "Block"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: KimiVLConfig) -> None:
        if config.vocab_size is None or config.media_placeholder_token_id is None:
            raise ValueError(
                "model.vocab_size and model.media_placeholder_token_id are null: fill them from the tokenizer "
                "with config.with_tokenizer(tokenizer) before building the model"
            )
        config._attn_implementation = SEGMENT_ATTENTION
        config.text_config._experts_implementation = implementation("auto")
        super().__init__(config)
        self.vision_tower = MoonViT(config.vision_config)
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = DeepseekV3ForCausalLM(config.text_config)
        self.media_id = config.media_placeholder_token_id
        self.kernels = Kernels()
        install(self.language_model.model)
        install_replay(self.language_model.model)
        route_in_float32(self.language_model)
        make_logits_in_float32(self.language_model.lm_head)
        self.post_init()
        self._keep_router_bias_in_float32()

    def set_kernels(self, kernels: Kernels) -> None:
        """Choose who computes attention, experts and loss."""
        self.kernels = kernels
        self.config.text_config._experts_implementation = implementation(kernels.experts)

    # ---- inputs -----------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    cut_up = False
    """Whether ranks share the parameters (`kimivl.model.parallel`): then all run the vision tower equally often."""

    def image_features(self, pixel_values: Tensor, image_grid_hws: Tensor, image_order: Tensor | None = None) -> Tensor:
        """(P, 3, 14, 14) pixels, uint8 or normalised, of all images -> (M, D) embeddings.

        ``image_order`` (J,): the image that each of J places shows, where one is shown at several; each image then
        goes through the vision tower once.
        """
        dtype = self.multi_modal_projector.linear_1.weight.dtype
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise(pixel_values)
        patches = self.vision_tower(pixel_values.to(dtype), image_grid_hws, self.kernels.attention)
        features = self.multi_modal_projector(patches)
        if image_order is None:
            return features
        tokens = image_grid_hws.prod(1) // math.prod(self.config.vision_config.merge_kernel_size)
        images = torch.arange(len(features), device=features.device).split(tokens.tolist())
        return features[torch.cat([images[number] for number in image_order.tolist()])]

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_grid_hws: Tensor | None,
        image_order: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) embeddings, with the image placeholders replaced by image features, in order."""
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None or pixel_values.shape[0] == 0:
            self._no_placeholders(input_ids)
            touched = self.cut_up or self.training and torch.is_grad_enabled()
            return embeds + self._touch_vision() if touched else embeds
        if image_grid_hws is None:
            raise ValueError("pixel_values without image_grid_hws: give the (h, w) of each image")
        features = self.image_features(pixel_values, image_grid_hws, image_order)
        places = self.placeholders(input_ids).flatten().nonzero().squeeze(1)
        if len(places) != len(features):
            raise ValueError(
                f"{len(places)} <|media_pad|> tokens in input_ids, but {len(features)} image tokens "
                f"(h*w/4 of {len(image_grid_hws)} images): expand each placeholder with KimiVLProcessor"
            )
        return embeds.flatten(0, 1).index_copy(0, places, features.to(embeds.dtype)).view_as(embeds)

    def placeholders(self, input_ids: Tensor) -> Tensor:
        """Mask of the tokens whose embeddings are replaced by image features."""
        return torch.eq(input_ids, self.media_id)

    def _no_placeholders(self, input_ids: Tensor) -> None:
        count = int(self.placeholders(input_ids).sum())
        if count:
            raise ValueError(f"{count} <|media_pad|> tokens in input_ids, but 0 image tokens: pass pixel_values")

    def _touch_vision(self) -> Tensor:
        """Zero, computed through the vision tower and the projector.

        A pack without images runs the same modules as one with images, so that sharded ranks take part in the
        same collectives and every parameter has a gradient.
        """
        size, (h, w) = self.config.vision_config.patch_size, self.config.vision_config.merge_kernel_size
        pixels = torch.zeros(h * w, 3, size, size, device=self.device)
        return self.image_features(pixels, torch.tensor([[h, w]])).sum() * 0.0

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hws: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (B, L, V) float32, or at `logits_to_keep` (the last n, or a 1-D index of positions) only.

        `cu_seqlens` (S + 1,): the row is a pack of S samples; attention is causal inside each, positions restart.
        Without it, rows are independent samples, padded as `attention_mask` (B, L) says; this is what generation
        uses, with `past_key_values` (made on the first call with `use_cache`).
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
            inputs_embeds = (
                self.get_input_embeddings()(input_ids)
                if decoding and pixel_values is None
                else self.embed(input_ids, pixel_values, image_grid_hws)
            )
        context = self._context(inputs_embeds, cu_seqlens, position_ids, attention_mask, past_key_values, use_cache)
        return self.language_model(inputs_embeds=inputs_embeds, logits_to_keep=logits_to_keep, **context, **kwargs)

    def _context(
        self,
        embeds: Tensor,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool,
    ) -> dict[str, Any]:
        """What the decoder needs to know about who sees whom."""
        if cu_seqlens is None:
            if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
                position_ids = positions_of_mask(attention_mask)[:, -embeds.shape[1] :]
            elif position_ids is not None:
                refuse_restarts(position_ids, attention_mask)
            if use_cache and past_key_values is None:
                past_key_values = decoding_cache()
            return {
                "position_ids": position_ids,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "use_cache": use_cache,
            }
        if use_cache or past_key_values is not None or attention_mask is not None:
            raise ValueError("cu_seqlens describes a training pack: no cache and no attention_mask with it")
        if len(embeds) != 1:
            raise ValueError(f"cu_seqlens describes one packed row, got {len(embeds)} rows: put them end to end")
        segments = Segments.of(cu_seqlens, embeds.shape[1])
        return {
            "position_ids": segments.positions if position_ids is None else position_ids,
            # transformers hands a 4-D mask through as it is, and builds no T x T mask of its own
            "attention_mask": cu_seqlens.view(1, 1, 1, -1),
            "segments": segments,
            "kernel": self.kernels.attention,
            "use_cache": False,
        }

    def target_log_probs(
        self,
        input_ids: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hws: Tensor | None = None,
        temperature: float = 1.0,
        image_order: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (K,) float32 of the targets of a pack.

        `input_ids`, `targets` (T,): targets[t] is the token that position t predicts, or -100. The vocabulary
        projection is applied at the K target positions only. `image_order`: see `image_features`.
        `experts` (T, MoE layers, experts per token): those to route to, -1 where the router decides; None: everywhere.
        """
        # first, since it waits for the device: later it would wait for the decoder too
        chosen = (targets != self.config.ignore_index).nonzero().squeeze(1)
        embeds = self.embed(input_ids[None], pixel_values, image_grid_hws, image_order)
        context = self._context(embeds, cu_seqlens, None, None, None, False)
        if experts is not None:
            check_routing(experts, len(input_ids), self.language_model.model)
            context["routing"] = experts
        hidden = self.language_model.model(inputs_embeds=embeds, **context).last_hidden_state[0]
        return linear_log_probs(
            hidden.index_select(0, chosen),
            self.language_model.lm_head.weight,
            targets[chosen],
            temperature,
            self.kernels.loss,
        )

    # ---- generation -------------------------------------------------------------------------------------------

    def slot_cache(self, slots: int) -> SlotCache:
        """A cache for continuous batching: see `SlotCache`."""
        return SlotCache(slots, len(self.language_model.model.layers))

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The growing cache, in the place of the dynamic one that `generate` would make."""
        given = model_kwargs.get("past_key_values")
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and isinstance(model_kwargs.get("past_key_values"), DynamicCache):
            model_kwargs["past_key_values"] = decoding_cache()
        return result

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        """Repeat each row `expand_size` times, and its images with it (not patch by patch, as transformers would)."""
        pixels, grids = kwargs.pop("pixel_values", None), kwargs.pop("image_grid_hws", None)
        if pixels is not None:
            kwargs_images = self._repeat_images(kwargs["input_ids"], pixels, grids, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return input_ids, model_kwargs | (kwargs_images if pixels is not None else {})

    def _repeat_images(self, ids: Tensor, pixels: Tensor, grids: Tensor, times: int) -> dict[str, Tensor]:
        patches = grids.prod(1)
        merged = patches.cumsum(0) // math.prod(self.config.vision_config.merge_kernel_size)
        placeholders = self.placeholders(ids).sum(1).cumsum(0)
        row_of_image = torch.searchsorted(placeholders, merged).tolist()
        images: list[int] = []
        for row in range(len(ids)):
            images += [image for image, owner in enumerate(row_of_image) if owner == row] * times
        blocks = pixels.split(patches.tolist())
        return {"pixel_values": torch.cat([blocks[i] for i in images]), "image_grid_hws": grids[images]}

    def _keep_router_bias_in_float32(self) -> None:
        for name, buffer in self.language_model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = buffer.data.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move and cast of the model. Buffers stay float32: rounded routing biases would choose other experts,
        and a RoPE frequency that is 0.2% off turns a token at position 100,000 by another angle altogether."""
        buffers = [(module, *named) for module in self.modules() for named in module._buffers.items()]
        super()._apply(fn, recurse)
        for module, name, before in buffers:
            now = module._buffers[name]
            if before is not None and now is not None and before.dtype != now.dtype:
                module._buffers[name] = before.to(now.device)
        return self


def positions_of_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) positions of padded rows: the first attended token of a row is 0; padding gets 0 too."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def refuse_restarts(position_ids: Tensor, attention_mask: Tensor | None) -> None:
    """ValueError for a pack given by its positions alone: a mask or a cache would let its samples see one another."""
    restarts = position_ids.diff(dim=-1) <= 0
    if attention_mask is not None and attention_mask.ndim == 2:
        attended = attention_mask[:, -position_ids.shape[1] :].bool()
        restarts = restarts & attended[:, 1:] & attended[:, :-1]
    if restarts.numel() and bool(restarts.any()):
        raise ValueError("position_ids restart inside a row: describe a pack with cu_seqlens")
