"""The other side of the comparison: a training step as plain transformers and torch write it.

The decoder is transformers' DeepseekV3ForCausalLM with ``attn_implementation="sdpa"`` and its eager loop over experts;
logits of all positions go to ``F.cross_entropy``. The weights are ours, so loss and gradients must be ours too. Three
layouts of the same samples:

    padded   batches of 4 samples in random order, padded to the longest of the batch
    sorted   the same with the samples in order of length (the Trainer's ``group_by_length`` at its best)
    masked   the packs as we have them, with a block-diagonal (1, 1, T, T) mask

Only real tokens are counted. The vision tower is written out as naive code has it: all patches in one sequence under a
dense (P, P) mask. torch has Muon for two-dimensional parameters only; here each matrix of a stack of experts, and each
of a fused ``wqkv``, is a parameter of its own that shares its memory, as a careful user would do it, so that the update
is the one that our optimiser makes; AdamW (fused) has the rest. torch's Muon computes in bfloat16, which a CPU
emulates about 30 times slower than float32: there its Newton-Schulz products are made in float32, as ours are.

Legend: B rows, L row length, T packed tokens, P patches, D width, N heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import _muon
from transformers import DeepseekV3ForCausalLM

from benchmarks.sides import Settings, Side
from kimivl.data.pack import IGNORE, PackedBatch
from kimivl.optim.matrices import SPLITS, matrices_of

ROWS = 4
"""Samples of a padded micro-batch: more of them waste more on padding, and full logits of more do not fit 24 GB."""
LAYOUTS = ("padded", "sorted", "masked")


class PlainModel(nn.Module):
    """Kimi-VL in plain parts; its parameters have the names that ours have."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        ours = settings.model()
        self.media_id = ours.media_id
        text = copy.deepcopy(ours.config.text_config)
        text._attn_implementation, text._experts_implementation = "sdpa", "eager"
        with torch.device("meta"):
            self.language_model = DeepseekV3ForCausalLM(text)
        self.language_model.load_state_dict(ours.language_model.state_dict(), assign=True)
        rotary = type(self.language_model.model.rotary_emb)
        self.language_model.model.rotary_emb = rotary(text).to(settings.device)  # its buffers are not in the state
        self.language_model.requires_grad_(True).train()
        self.vision_tower, self.multi_modal_projector = ours.vision_tower, ours.multi_modal_projector

    def embeds(self, ids: Tensor, pixels: Tensor, grids: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, D) embeddings, with the features of the images in their places."""
        embeds = self.language_model.get_input_embeddings()(ids)
        if not len(pixels):
            return embeds
        features = self.image_features(pixels, grids.tolist())
        places = (ids == self.media_id).unsqueeze(-1).expand_as(embeds)
        return embeds.masked_scatter(places, features.to(embeds.dtype))

    def image_features(self, pixels: Tensor, grids: list[list[int]]) -> Tensor:
        """(P, 3, 14, 14) uint8 pixels -> (P / 4, D) embeddings."""
        tower, projector = self.vision_tower, self.multi_modal_projector
        dtype = projector.linear_1.weight.dtype
        x = tower.patch_embed.proj((pixels.float() / 127.5 - 1).to(dtype)).flatten(1)
        x = x + torch.cat([_positions(tower.patch_embed.pos_emb.weight, h, w) for h, w in grids])
        heads = tower.encoder.blocks[0].num_heads
        turn = torch.cat([_turn(h, w, x.shape[-1] // heads, x.device) for h, w in grids])[:, None]  # (P, 1, D / 2)
        image = torch.repeat_interleave(torch.tensor([h * w for h, w in grids])).to(x.device)
        mask = image[:, None] == image
        for block in tower.encoder.blocks:
            q, k, v = block.wqkv(block.norm0(x)).view(len(x), 3, heads, -1).unbind(1)
            q, k = (_turned(states, turn) for states in (q, k))
            q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(0)
            x = x + block.wo(mixed.transpose(0, 1).flatten(1))
            x = x + block.mlp.fc1(F.gelu(block.mlp.fc0(block.norm1(x)), approximate="tanh"))
        x = projector.pre_norm(tower.encoder.final_layernorm(x))
        pieces = x.split([h * w for h, w in grids])
        x = torch.cat([_merged(piece, h, w) for piece, (h, w) in zip(pieces, grids, strict=True)])
        return projector.linear_2(F.gelu(projector.linear_1(x)))


def _positions(table: Tensor, h: int, w: int) -> Tensor:
    resized = F.interpolate(table.float().permute(2, 0, 1)[None], size=(h, w), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).reshape(h * w, -1).to(table.dtype)


def _turn(h: int, w: int, width: int, device: torch.device) -> Tensor:
    """(h w, width / 2) complex numbers of modulus 1: [x f0, y f0, x f1, ...] as angles."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 4, dtype=torch.float32, device=device) / width)
    place = torch.arange(h * w, device=device)
    angles = torch.stack([torch.outer(place % w, frequencies), torch.outer(place // w, frequencies)], -1).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def _turned(states: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(states.dtype)


def _merged(patches: Tensor, h: int, w: int) -> Tensor:
    """(h w, D) patches in raster order -> (h w / 4, 4 D): squares of 2x2 in raster order."""
    return patches.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2).reshape(h * w // 4, -1)


class Plain(Side):
    """Plain transformers on the same packs, in one of ``LAYOUTS``."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.model = PlainModel(settings)
        self.optimizer = PlainOptimizer(self.model, settings)
        self.optimizer.muon.step = self.muon.timed(self.optimizer.muon.step)  # type: ignore[method-assign]
        self.clip = settings.cfg.trainer.get("gradient_clip_val") or float("inf")

    def update(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return norm

    def micro_batches(self, packs: list[PackedBatch], layout: str) -> Iterator[Callable[[], Tensor]]:
        if layout == "masked":
            for pack in packs:
                yield lambda pack=pack: self._masked(pack.to(self.device))
            return
        samples = [(pack, sample) for pack in packs for sample in range(pack.num_samples)]
        if layout == "padded":
            samples = [samples[number] for number in np.random.default_rng(0).permutation(len(samples))]
        else:
            samples.sort(key=lambda chosen: int(chosen[0].cu_seqlens.diff()[chosen[1]]))
        for start in range(0, len(samples), ROWS):
            yield lambda rows=samples[start : start + ROWS]: self._padded(rows)

    def _masked(self, pack: PackedBatch) -> Tensor:
        segment = torch.repeat_interleave(pack.cu_seqlens.diff())
        causal = torch.ones(len(segment), len(segment), dtype=torch.bool, device=self.device).tril()
        mask = ((segment[:, None] == segment) & causal)[None, None]
        positions = torch.arange(len(segment), device=self.device) - pack.cu_seqlens[segment]
        embeds = self.model.embeds(pack.input_ids[None], pack.pixel_values, pack.image_grid_hws)
        return self._loss(embeds, pack.targets[None], mask, positions[None]) / pack.step_targets

    def _padded(self, rows: list[tuple[PackedBatch, int]]) -> Tensor:
        samples = [sample_of(pack, number, self.model.media_id) for pack, number in rows]
        ids, targets, pixels, grids = zip(*samples, strict=True)
        ids, targets = (
            nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=fill).to(self.device)
            for column, fill in ((ids, 0), (targets, IGNORE))
        )
        lengths = torch.tensor([int(pack.cu_seqlens.diff()[number]) for pack, number in rows], device=self.device)
        attended = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        embeds = self.model.embeds(ids, torch.cat(pixels).to(self.device), torch.cat(grids))
        return self._loss(embeds, targets, attended.long(), None) / rows[0][0].step_targets

    def _loss(self, embeds: Tensor, targets: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
        """Sum over the targets, from the logits of all positions."""
        decoder = self.model.language_model
        found = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        return F.cross_entropy(found.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def sample_of(pack: PackedBatch, number: int, media_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, targets, pixels and grids of one sample of a pack."""
    start, end = pack.cu_seqlens[number : number + 2].tolist()
    ids = pack.input_ids[start:end]
    ends = (pack.image_grid_hws.prod(1) // 4).cumsum(0)  # image tokens up to each image, and with it
    before = int((pack.input_ids[:start] == media_id).sum())
    mine = (ends > before) & (ends <= before + int((ids == media_id).sum()))
    pixels = torch.repeat_interleave(mine, pack.image_grid_hws.prod(1))
    return ids, pack.targets[start:end], pack.pixel_values[pixels], pack.image_grid_hws[mine]


class PlainOptimizer:
    """torch.optim.Muon on each matrix, torch.optim.AdamW on the rest, at a learning rate of zero."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        if settings.device.type == "cpu":
            _muon._zeropower_via_newtonschulz = newton_schulz_float32
        options: dict[str, Any] = settings.cfg.optimizer
        decay = options.get("weight_decay", 0.1)
        self.parts: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        rest = []
        for name, parameter in model.named_parameters():
            matrices = matrices_of(name, parameter, SPLITS)
            if matrices is None:
                rest.append(parameter)
            else:
                views = parameter.detach().reshape(matrices).unbind()
                self.parts.append((parameter, [nn.Parameter(view) for view in views]))
        single = [view for _, views in self.parts for view in views]
        self.muon = torch.optim.Muon(single, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=0.0, weight_decay=decay, fused=True)

    def step(self) -> None:
        """Update, and forget the gradients."""
        for parameter, views in self.parts:
            gradients = parameter.grad
            for number, view in enumerate(views):
                view.grad = None if gradients is None else gradients.view(len(views), *view.shape)[number]
        self.muon.step()
        self.adamw.step()
        self.adamw.zero_grad()
        for parameter, views in self.parts:
            parameter.grad = None
            for view in views:
                view.grad = None


def newton_schulz_float32(
    grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> Tensor:
    """What torch.optim.Muon computes, in float32."""
    a, b, c = ns_coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.shape[0] > grad.shape[1] else x
