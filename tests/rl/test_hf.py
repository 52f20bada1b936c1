"""Continuous batching: the same responses as one by one, in the order in which they end, with full slots."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from kimivl.data.pack import IGNORE, EncodedSample, pack_samples
from kimivl.data.sample import Sample
from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.rl.experience import trajectory
from kimivl.rl.hf import HFRolloutEngine
from kimivl.rl.repetition import Repetition
from kimivl.rl.rollout import response_seed
from kimivl.rl.types import Policy, Problem, Request, Sampling

STOP, MEDIA, VOCABULARY = 22, 5, 40
CONFIG = {
    "vocab_size": VOCABULARY,
    "media_placeholder_token_id": MEDIA,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "init_pos_emb_height": 4,
        "init_pos_emb_width": 4,
    },
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "initializer_range": 0.4,
    },
}


def prompt(words: int, grids: list[tuple[int, int]], seed: int = 1) -> EncodedSample:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, VOCABULARY, (words,), generator=generator)
    image_tokens = sum(height * width // 4 for height, width in grids)
    patches = sum(height * width for height, width in grids)
    ids = torch.cat([text[:1], torch.full((image_tokens,), MEDIA), text[1:]])
    return EncodedSample(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        pixel_values=torch.randint(0, 256, (patches, 3, 14, 14), generator=generator, dtype=torch.uint8),
        image_grid_hws=torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
    )


def problem(number: int, encoded: EncodedSample) -> Problem:
    return Problem(number, Sample(key=f"p{number}", messages=[], images=(), answer="1"), encoded)


PROBLEMS = [
    problem(number, prompt(words, grids, number))
    for number, (words, grids) in enumerate([(6, [(2, 4)]), (3, []), (11, [(2, 2), (4, 2)]), (40, []), (1, [])])
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KimiVLForConditionalGeneration(KimiVLConfig(**CONFIG)).eval()


def make(model, never=(MEDIA,), stop_id=STOP, **settings):
    return HFRolloutEngine(Policy(model, decode=str, stop_id=stop_id, pad_id=0, never=never), **settings)


def requests(k=2, problems=PROBLEMS, **settings):
    return [Request(p, response_seed(7, p.number, g), **settings) for p in problems for g in range(k)]


def tokens(responses):
    return [response.tokens for response in responses]


# ---- the responses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(model):
    """Each request by itself, at each temperature."""
    engine = make(model)
    return {t: [engine.generate([request], Sampling(24, t))[0] for request in requests()] for t in (0.0, 1.0)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings", [{}, {"max_rows": 3}, {"max_rows": 3, "prefill_tokens": 1}, {"prefill_tokens": 30}]
)
def test_batching_changes_nothing(model, alone, settings, temperature):
    together = make(model, **settings).generate(requests(), Sampling(24, temperature))
    assert tokens(together) == tokens(alone[temperature])
    assert [r.stop for r in together] == [r.stop for r in alone[temperature]]
    for one, other in zip(alone[temperature], together, strict=True):
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-4)


def test_what_is_compared_is_varied(alone):
    assert {r.stop for r in alone[1.0]} == {"stop", "length"}
    assert len({len(r) for r in alone[1.0]}) > 4 and len(set(tokens(alone[1.0]))) == len(requests())


def test_the_order_of_requests_changes_nothing(model, alone):
    asked = requests()
    order = np.random.default_rng(0).permutation(len(asked))
    shuffled = make(model, max_rows=4).generate([asked[n] for n in order], Sampling(24))
    assert tokens(alone[1.0]) == [shuffled[n].tokens for n in np.argsort(order)]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_and_experts_are_those_of_the_packed_model(model, temperature):
    asked = requests()
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.language_model.model.layers[1:]]
    responses = make(model, max_rows=5, return_experts=True).generate(asked, Sampling(12, temperature))
    samples = [trajectory(r.problem.prompt, torch.tensor(s.tokens)) for r, s in zip(asked, responses, strict=True)]
    pack = pack_samples(samples)
    hooks = [gate.register_forward_hook(lambda _, __, output: chosen.append(output[2])) for gate in gates]
    with torch.no_grad():
        logp = model.target_log_probs(**pack.model_inputs(), temperature=temperature or 1.0)
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(np.concatenate([r.logp for r in responses]), logp.numpy(), atol=1e-4)
    packed = torch.stack(chosen, 1).sort(-1).values.split([len(sample) for sample in samples])
    for sample, response, expected in zip(samples, responses, packed, strict=True):
        assert response.experts.shape == (len(sample) - 1, 2, 2) and response.experts.dtype == np.uint8
        assert np.array_equal(np.sort(response.experts, -1), expected[:-1].numpy())


def test_greedy_takes_the_argmax_of_the_packed_model(model):
    asked = requests(k=1)
    for request, response in zip(asked, make(model).generate(asked, Sampling(12, 0)), strict=True):
        pack = pack_samples([trajectory(request.problem.prompt, torch.tensor(response.tokens))])
        inputs = {name: value for name, value in pack.model_inputs().items() if name not in ("targets", "image_order")}
        logits = model(**inputs | {"input_ids": pack.input_ids[None]}).logits[0]
        assert logits[len(request.problem.prompt) - 1 : -1].argmax(-1).tolist() == list(response.tokens)


def test_what_is_never_drawn(model):
    drawn = {t for r in make(model, never=(MEDIA, 11)).generate(requests(64), Sampling(10)) for t in r.tokens}
    assert not drawn & {MEDIA, 11} and {10, 12} <= drawn


def test_the_text_is_without_the_closing_token(model):
    for response in make(model).generate(requests(4), Sampling(20)):
        assert STOP not in response.tokens[:-1] and response.finished == (response.tokens[-1] == STOP)
        assert response.text == str(list(response.tokens[:-1] if response.finished else response.tokens))


# ---- prefixes, budgets, repetition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("budget", [7])
def test_partial_equals_uninterrupted(model, temperature, budget):
    sampling = Sampling(24, temperature, Repetition(times=3, max_period=4, min_tokens=9))
    engine = make(model, max_rows=5, return_experts=True)
    asked = requests()
    whole = engine.generate(asked, sampling)
    parts = [Request(r.problem, r.seed, budget=budget) for r in asked]
    responses = engine.generate(parts, sampling)
    logp = [response.logp for response in responses]
    while waiting := [n for n, response in enumerate(responses) if response.stop == "budget"]:
        going_on = [replace(parts[n], prefix=responses[n].tokens) for n in waiting]
        for n, response in zip(waiting, engine.generate(going_on, sampling), strict=True):
            before = len(responses[n])
            assert len(response) <= before + budget and bool(np.isnan(response.logp[:before]).all())
            logp[n] = np.concatenate([logp[n], response.logp[before:]])
            responses[n] = response
    assert tokens(responses) == tokens(whole) and [r.stop for r in responses] == [r.stop for r in whole]
    for one, joined, response in zip(whole, logp, responses, strict=True):
        np.testing.assert_allclose(one.logp, joined, atol=1e-4)
        assert np.array_equal(np.sort(one.experts, -1), np.sort(response.experts, -1))


def test_a_repetition_is_stopped_where_it_is_found(model):
    sampling = Sampling(96, 0)
    greedy = make(model, stop_id=-1).generate(requests(1), sampling)
    repetition = Repetition(times=3, max_period=16, min_tokens=12)
    places = [repetition.first(response.tokens) for response in greedy]
    stopped = make(model, stop_id=-1).generate(requests(1), replace(sampling, repetition=repetition))
    assert any(places)
    for place, one, other in zip(places, greedy, stopped, strict=True):
        assert other.stop == ("repetition" if place else "length")
        assert other.tokens == one.tokens[: place or 96]


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        ({"prefix": (11, STOP)}, "stop"),
        ({"prefix": (11,) * 20}, "length"),
        ({"prefix": (11,) * 25, "budget": 3}, "length"),
        ({"prefix": (11,), "budget": 0}, "budget"),
        ({"budget": 0}, "budget"),
    ],
)
def test_what_has_nothing_to_draw_comes_back_as_it_is(model, settings, stop):
    engine = make(model)
    [response, other] = engine.generate([Request(PROBLEMS[0], 1, **settings), Request(PROBLEMS[1], 2)], Sampling(20))
    assert (response.stop, response.tokens) == (stop, settings.get("prefix", ()))
    assert np.isnan(response.logp).all() and len(response.logp) == len(response) and len(other) > 0


# ---- slots ----------------------------------------------------------------------------------------------------------


def test_a_finished_row_is_replaced_at_once(model):
    """One long response among 30 short ones, on three slots: it takes one slot and holds nobody."""
    engine = make(model, stop_id=-1, max_rows=3)
    short = [Request(PROBLEMS[n % 4], n, budget=4) for n in range(30)]
    asked = [Request(PROBLEMS[0], 99), *short]
    order = [number for number, _ in engine.stream(asked, Sampling(60))]
    assert 0 in order[-3:] and sorted(order) == list(range(31))
    figures = engine.figures()
    assert figures["perf/rollout_tokens"] == 60 + 30 * 4
    assert figures["perf/rollout_steps"] == 60  # the two other slots: 30 / 2 responses of 4 tokens, meanwhile
    assert figures["perf/rollout_rows"] == 3.0 and figures["perf/rollout_slot_use"] == 1.0


def test_rows_are_closed_up_when_no_request_is_left(model):
    engine = make(model, stop_id=-1)
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs.get("input_ids", ()))), with_kwargs=True
    )
    asked = [Request(PROBLEMS[n % 5], n, budget=4 * (n % 3 + 1)) for n in range(9)]
    engine.generate(asked, Sampling(60))
    hook.remove()
    assert rows[0] == 0 and rows[1:] == [9] * 4 + [6] * 4 + [3] * 4


def test_prompts_and_images_are_read_once(model, monkeypatch):
    seen: list[int] = []
    encode = model.vision_tower.forward
    monkeypatch.setattr(
        model.vision_tower, "forward", lambda pixels, *rest: seen.append(len(pixels)) or encode(pixels, *rest)
    )
    engine = make(model, max_rows=2)
    engine.generate(requests(8), Sampling(5))
    assert engine.figures()["perf/prefill_tokens"] == sum(len(p.prompt) - 1 for p in PROBLEMS)
    assert sum(seen) == sum(len(p.prompt.pixel_values) for p in PROBLEMS)
    seen.clear()
    prefixed = [Request(PROBLEMS[0], n, prefix=(10 + n,)) for n in range(3)]
    make(model).generate(prefixed, Sampling(5))
    assert sum(seen) == len(PROBLEMS[0].prompt.pixel_values)


def test_what_was_read_is_let_go_of_when_its_responses_have_begun(model, monkeypatch):
    engine = make(model, stop_id=-1)
    read, caches = engine._prefill, []

    def prefill(*args):
        batch = read(*args)
        caches.append(weakref.ref(batch.cache))
        return batch

    monkeypatch.setattr(engine, "_prefill", prefill)
    stream = engine.stream([Request(PROBLEMS[0], n, budget=n + 1) for n in range(2)], Sampling(9))
    next(stream)
    gc.collect()
    assert len(caches) == 1 and caches[0]() is None
    stream.close()


def test_nothing_asked_nothing_done(model):
    engine = make(model)
    assert engine.generate([], Sampling(5)) == []
    assert engine.figures()["perf/rollout_tokens"] == 0 == engine.tokens_per_second


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.vision_tower.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    engine = make(model, max_rows=2)
    stream = engine.stream(requests(), Sampling(20))
    next(stream)
    assert not model.training
    stream.close()  # who reads it gives up
    assert {name: module.training for name, module in model.named_modules()} == modes
    hook = model.language_model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(requests(), Sampling(20))
    hook.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(engine.generate(requests(1), Sampling(20))) == len(PROBLEMS)
    model.eval()


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"max_rows": 0}, {"prefill_tokens": 0}])
def test_settings_that_cannot_be_right(model, settings):
    [name] = settings
    with pytest.raises(ValueError, match=f"rollout.{name}"):
        make(model, **settings)


def test_a_negative_budget_names_the_problem(model):
    with pytest.raises(ValueError, match="p2: a budget of -1"):
        make(model).generate([Request(PROBLEMS[2], 1, budget=-1)], Sampling(5))


def test_a_diverged_policy_is_an_error(model):
    hook = model.language_model.lm_head.register_forward_hook(lambda _, __, output: output * float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        make(model).generate(requests(1), Sampling(5))
    hook.remove()


def test_experts_of_a_model_without_any():
    with pytest.raises(ValueError, match="return_experts"):
        make(torch.nn.Linear(2, 2), return_experts=True)
