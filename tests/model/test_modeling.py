from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch

from kimivl.model import Kernels, KimiVLForConditionalGeneration
from kimivl.model.checkpointing import Mode, checkpoint_activations
from kimivl.model.lora import TARGETS, add_lora
from kimivl.model.modeling import positions_of_mask
from kimivl.model.router import Router


@pytest.fixture
def samples(make_sample):
    """Text, one image, text, three images of different sizes, one image: as a pack mixes them."""
    return [
        make_sample(9),
        make_sample(20, (2, 8)),
        make_sample(1),
        make_sample(40, (4, 4), (2, 2), (6, 4)),
        make_sample(20, (2, 8)),
    ]


def pack(samples):
    ids = torch.cat([ids for ids, _, _ in samples])
    cu_seqlens = torch.tensor([0] + [len(ids) for ids, _, _ in samples]).cumsum(0).int()
    grids = torch.tensor([grid for _, _, grids in samples for grid in grids]).view(-1, 2)
    return ids, cu_seqlens, torch.cat([pixels for _, pixels, _ in samples]), grids


def alone(model, sample):
    ids, pixels, grids = sample
    images = (pixels, torch.tensor(grids)) if grids else (None, None)
    return model(ids[None], *images).logits[0]


def shifted_targets(ids, cu_seqlens):
    """Each position predicts the next token of its own sample."""
    targets = ids.roll(-1)
    targets[cu_seqlens[1:].long() - 1] = -100
    return targets


def left_padded(samples, pad=0):
    longest = max(len(ids) for ids, _, _ in samples)
    rows = torch.full((len(samples), longest), pad)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, (ids, _, _) in enumerate(samples):
        rows[row, longest - len(ids) :] = ids
        mask[row, longest - len(ids) :] = 1
    _, _, pixels, grids = pack(samples)
    return {"input_ids": rows, "attention_mask": mask, "pixel_values": pixels, "image_grid_hws": grids}


@torch.no_grad()
def test_packed_equals_unpacked(tiny, samples):
    ids, cu_seqlens, pixels, grids = pack(samples)
    packed = tiny(ids[None], pixels, grids, cu_seqlens=cu_seqlens).logits[0]
    for sample, logits in zip(samples, packed.split(cu_seqlens.diff().tolist()), strict=True):
        torch.testing.assert_close(logits, alone(tiny, sample), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_padded_equals_unpadded(tiny, samples):
    batch = left_padded(samples)
    padded = tiny(**batch).logits
    for row, sample in zip(padded, samples, strict=True):
        torch.testing.assert_close(row[-len(sample[0]) :], alone(tiny, sample), atol=2e-5, rtol=1e-4)


def test_train_equals_eval(tiny, samples):
    ids, cu_seqlens, pixels, grids = pack(samples)
    evaluated = tiny(ids[None], pixels, grids, cu_seqlens=cu_seqlens).logits
    try:
        trained = tiny.train()(ids[None], pixels, grids, cu_seqlens=cu_seqlens).logits
    finally:
        tiny.eval()
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_target_log_probs(tiny, samples, temperature):
    ids, cu_seqlens, pixels, grids = pack(samples)
    targets = shifted_targets(ids, cu_seqlens)
    targets[::3] = -100
    ours = tiny.target_log_probs(ids, targets, cu_seqlens, pixels, grids, temperature)
    logits = tiny(ids[None], pixels, grids, cu_seqlens=cu_seqlens).logits[0]
    chosen = targets != -100
    expected = (logits / temperature).log_softmax(-1)[chosen].gather(1, targets[chosen][:, None])[:, 0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_uint8_pixels_are_normalised_and_others_are_taken_as_they_are(tiny, make_sample):
    _, pixels, grids = make_sample(20, (2, 8))
    ours = tiny.image_features(pixels, torch.tensor(grids))
    theirs = tiny.image_features(pixels / 127.5 - 1, torch.tensor(grids))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradient_reaches_every_parameter(tiny, samples):
    ids, cu_seqlens, pixels, grids = pack(samples)
    tiny.zero_grad()
    tiny.target_log_probs(ids, shifted_targets(ids, cu_seqlens), cu_seqlens, pixels, grids).mean().backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert not any(name.endswith("e_score_correction_bias") for name, _ in tiny.named_parameters())


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_shared_image_equals_its_copies(tiny_config, make_sample, mode):
    """Responses to one problem refer to its pictures; values and gradients are those of copies."""
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(tiny_config)
    one, other = make_sample(20, (2, 4), (4, 4)), make_sample(14, (2, 2))
    ids, cu_seqlens, pixels, grids = pack([one, other, one, one])
    targets = shifted_targets(ids, cu_seqlens)
    shared_pixels, shared_grids = torch.cat([one[1], other[1]]), torch.tensor(one[2] + other[2])
    order = torch.tensor([0, 1, 2, 0, 1, 0, 1])
    results = []
    for inputs in ((pixels, grids, 1.0, None), (shared_pixels, shared_grids, 1.0, order)):
        model.zero_grad()
        checkpoint_activations(model.train(), mode if results else "none")
        logp = model.target_log_probs(ids, targets, cu_seqlens, *inputs)
        logp.sum().backward()
        results.append((logp.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_pack_without_targets_has_zero_gradients_and_an_auxiliary_loss(tiny, samples, adapted):
    model = copy.deepcopy(tiny).train()
    if adapted:
        add_lora(model, 2, 4, list(TARGETS))
    checkpoint_activations(model, "full")
    router = Router(model, aux_loss_weight=0.1)
    ids, cu_seqlens, pixels, grids = pack(samples)
    with router.record(cu_seqlens):
        logp = model.target_log_probs(ids, torch.full_like(ids, -100), cu_seqlens, pixels, grids)
    assert logp.shape == (0,) and router.load.sum(1).tolist() == [2 * len(ids)] * 3

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for gradient in torch.autograd.grad(logp.sum(), trained.values(), retain_graph=True):
        assert not gradient.any()
    router.aux_loss.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in trained.values())


@torch.no_grad()
@pytest.mark.parametrize("kernels", [Kernels("sdpa", "sorted", "chunked"), Kernels("flex", "grouped_mm")])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_without_gradients_every_kernel_of_a_cpu_does_the_same(tiny, samples, kernels):
    model = copy.deepcopy(tiny).train()  # as the references of RL are computed
    ids, cu_seqlens, pixels, grids = pack(samples)
    inputs = ids, shifted_targets(ids, cu_seqlens), cu_seqlens, pixels, grids
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = tiny.target_log_probs(*inputs), tiny.generate(**left_padded(samples), **options)
    model.set_kernels(kernels)
    torch.testing.assert_close(model.target_log_probs(*inputs), expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.eval().generate(**left_padded(samples), **options), expected[1])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # not in 5.17 under its new name
def test_recomputed_activations_give_the_same_gradient(tiny_config, samples):
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(tiny_config).train()
    ids, cu_seqlens, pixels, grids = pack(samples)
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.target_log_probs(ids, shifted_targets(ids, cu_seqlens), cu_seqlens, pixels, grids).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(layer.gradient_checkpointing for layer in model.vision_tower.encoder.blocks)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_initial_weights(tiny_config):
    """Vision linears: std sqrt(2 / fan-in), positions normal(0, 1); the decoder: std initializer_range."""
    torch.manual_seed(0)
    model = KimiVLForConditionalGeneration(tiny_config)
    std = {name: parameter.std().item() for name, parameter in model.named_parameters()}
    assert std["vision_tower.patch_embed.proj.weight"] == pytest.approx((2 / 588) ** 0.5, rel=0.05)
    assert std["vision_tower.encoder.blocks.0.mlp.fc1.weight"] == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert std["vision_tower.patch_embed.pos_emb.weight"] == pytest.approx(1, rel=0.05)
    assert std["language_model.model.layers.1.mlp.experts.gate_up_proj"] == pytest.approx(0.02, rel=0.05)
    assert std["language_model.lm_head.weight"] == pytest.approx(0.02, rel=0.05)


def test_pack_without_images_touches_the_vision_tower(tiny, make_sample):
    ids, cu_seqlens, _, _ = pack([make_sample(12), make_sample(7)])
    targets = shifted_targets(ids, cu_seqlens)
    evaluated = tiny.target_log_probs(ids, targets, cu_seqlens)
    tiny.zero_grad()
    try:
        trained = tiny.train().target_log_probs(ids, targets, cu_seqlens)
    finally:
        tiny.eval()
    trained.mean().backward()
    assert torch.equal(trained, evaluated)
    for part in (tiny.vision_tower, tiny.multi_modal_projector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_the_vision_tower_is_touched_for_its_gradients_only(tiny, make_sample, monkeypatch):
    ids, cu_seqlens, _, _ = pack([make_sample(12)])
    monkeypatch.setattr(type(tiny), "_touch_vision", None)
    tiny.target_log_probs(ids, ids, cu_seqlens)
    try:
        with torch.no_grad():
            tiny.train().target_log_probs(ids, ids, cu_seqlens)
    finally:
        tiny.eval()


def test_the_loss_is_that_of_the_kernels(tiny, make_sample, monkeypatch):
    monkeypatch.setattr(tiny, "kernels", Kernels(loss="liger"))
    ids, cu_seqlens, _, _ = pack([make_sample(12)])
    with pytest.raises(ValueError, match="kernels.loss=liger runs on CUDA devices"):
        tiny.target_log_probs(ids, ids, cu_seqlens)


def test_cached_greedy_equals_uncached_and_unpadded(tiny, samples):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = left_padded(samples)
    cached = tiny.generate(**batch, **options)
    assert torch.equal(cached, tiny.generate(**batch, use_cache=False, **options))
    for row, (ids, pixels, grids) in zip(cached, samples, strict=True):
        images = {"pixel_values": pixels, "image_grid_hws": torch.tensor(grids)} if grids else {}
        single = tiny.generate(input_ids=ids[None], **images, **options)
        assert torch.equal(row[-8:], single[0, -8:])


def test_several_sequences_of_a_row_see_its_images(tiny, samples):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = left_padded(samples)
    once = tiny.generate(**batch, **options)
    repeated = {name: batch[name].repeat_interleave(2, 0) for name in ("input_ids", "attention_mask")}
    images = tiny._repeat_images(batch["input_ids"], batch["pixel_values"], batch["image_grid_hws"], 2)
    assert images["image_grid_hws"].tolist()[1:8] == [[2, 8], [4, 4], [2, 2], [6, 4], [4, 4], [2, 2], [6, 4]]
    assert torch.equal(tiny.generate(**repeated, **images, **options), once.repeat_interleave(2, 0))
    beams = tiny.generate(**batch, **options, num_beams=2, num_return_sequences=2)
    assert len(beams) == 2 * len(samples)


def test_placeholder_counts_are_named(tiny, make_sample):
    ids, pixels, _ = make_sample(20, (2, 8))
    with pytest.raises(ValueError, match=r"4 <\|media_pad\|> .* but 2 image tokens"):
        tiny(ids[None], pixels[:8], torch.tensor([[2, 4]]))
    with pytest.raises(ValueError, match=r"4 <\|media_pad\|> .* but 0 image tokens"):
        tiny(ids[None])
    ids[ids == tiny.config.media_placeholder_token_id] = 1
    with pytest.raises(ValueError, match=r"0 <\|media_pad\|> .* but 4 image tokens"):
        tiny(ids[None], pixels, torch.tensor([[2, 8]]))


def test_samples_never_attend_across(tiny):
    """What transformers does silently with packed positions beside a cache or a mask is an error here."""
    ids = torch.arange(8)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    for options in ({}, {"use_cache": True}, {"attention_mask": torch.ones(1, 8, dtype=torch.long)}):
        with pytest.raises(ValueError, match="cu_seqlens"):
            tiny(ids, position_ids=positions, **options)
    with pytest.raises(ValueError, match="cu_seqlens"):
        tiny(ids, position_ids=torch.zeros_like(ids))  # samples of one token
    with pytest.raises(ValueError, match="no cache"):
        tiny(ids, cu_seqlens=torch.tensor([0, 4, 8]), use_cache=True)
    with pytest.raises(ValueError, match="one packed row, got 2 rows"):
        tiny(ids.repeat(2, 1), cu_seqlens=torch.tensor([0, 4, 8]))


@pytest.mark.parametrize("cu_seqlens", [[0, 4], [1, 8], [0, 4, 4, 8], [0, 8, 4, 8]])
def test_wrong_cu_seqlens_are_refused(tiny, cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 8 tokens"):
        tiny(torch.arange(8)[None], cu_seqlens=torch.tensor(cu_seqlens))


def test_positions_of_a_pack_restart(tiny):
    """RoPE is relative, so results would hardly tell; far from 0 its angles are coarse."""
    embeds, cu_seqlens = torch.zeros(1, 5, 128), torch.tensor([0, 3, 5])
    for given, expected in ((None, [[0, 1, 2, 0, 1]]), (torch.tensor([[7, 8, 9, 0, 1]]), [[7, 8, 9, 0, 1]])):
        context = tiny._context(embeds, cu_seqlens, given, None, None, False)
        assert context["position_ids"].tolist() == expected


def test_positions():
    assert positions_of_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_logits_to_keep(tiny):
    ids = torch.arange(8)[None]
    with torch.no_grad():
        full = tiny(ids).logits
        for keep, positions in ((2, [6, 7]), (torch.tensor([1, 5]), [1, 5])):
            torch.testing.assert_close(tiny(ids, logits_to_keep=keep).logits, full[:, positions])
