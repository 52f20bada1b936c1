"""Generation: the same seed gives the same response however prompts are batched, with the right probabilities."""

import numpy as np
import pytest
import torch

from kimivl.data.pack import IGNORE, EncodedSample, pack_samples
from kimivl.model import KimiVLConfig, KimiVLForConditionalGeneration
from kimivl.rl.rollout import HFRolloutEngine, response_seed, sample_tokens, uniform
from kimivl.rl.types import Sampling, trajectory

STOP, MEDIA, VOCABULARY = 9, 5, 40
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
        "num_hidden_layers": 2,
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


def prompts() -> list[EncodedSample]:
    """Three prompts of different lengths: with one image, with none, with two."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for words, grids in [(6, [(2, 4)]), (3, []), (11, [(2, 2), (4, 2)])]:
        text = torch.randint(10, VOCABULARY, (words,), generator=generator)
        image_tokens = sum(height * width // 4 for height, width in grids)
        patches = sum(height * width for height, width in grids)
        ids = torch.cat([text[:2], torch.full((image_tokens,), MEDIA), text[2:]])
        made.append(
            EncodedSample(
                input_ids=ids,
                labels=torch.full_like(ids, IGNORE),
                pixel_values=torch.randint(0, 256, (patches, 3, 14, 14), generator=generator, dtype=torch.uint8),
                image_grid_hws=torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
            )
        )
    return made


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KimiVLForConditionalGeneration(KimiVLConfig(**CONFIG)).eval()


@pytest.fixture
def engine(model):
    return HFRolloutEngine(model, decode=str, stop_id=STOP, pad_id=0)


def seeds(count, group):
    return [[response_seed(7, problem, sample) for sample in range(group)] for problem in range(count)]


def tokens(groups):
    return [[response.tokens for response in group] for group in groups]


def test_batching_changes_nothing(model, engine):
    sampling, batch = Sampling(20), prompts()
    together = tokens(engine.generate(batch, seeds(len(batch), 4), sampling))
    alone = [tokens(engine.generate([p], [s], sampling))[0] for p, s in zip(batch, seeds(len(batch), 4), strict=True)]
    small = HFRolloutEngine(model, decode=str, stop_id=STOP, pad_id=0, max_rows=5)
    assert together == alone == tokens(small.generate(batch, seeds(len(batch), 4), sampling))
    assert len({response for group in together for response in group}) > len(batch)


def test_greedy_is_the_argmax_of_the_packed_model(model, engine):
    """Each token is the most likely one of a plain forward pass over all that precedes it, images included."""
    for prompt, (response,) in zip(
        prompts(), engine.generate(prompts(), [[0]] * len(prompts()), Sampling(12, temperature=0)), strict=True
    ):
        sample = trajectory(prompt, torch.tensor(response.tokens))
        pack = pack_samples([sample])
        logits = model(
            input_ids=pack.input_ids[None],
            cu_seqlens=pack.cu_seqlens,
            pixel_values=pack.pixel_values,
            image_grid_hws=pack.image_grid_hws,
        ).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(response.tokens)


def test_responses_end_at_the_stop_token_or_the_cap(engine):
    groups = engine.generate(prompts(), seeds(len(prompts()), 16), Sampling(30))
    responses = [response for group in groups for response in group]
    assert any(response.finished for response in responses)
    for response in responses:
        assert STOP not in response.tokens[:-1]
        assert response.finished == (response.tokens[-1] == STOP)
        assert response.finished or len(response) == 30
    assert engine.tokens_per_second > 0


def test_an_image_placeholder_is_never_drawn(model):
    engine = HFRolloutEngine(model, decode=str, stop_id=STOP, pad_id=0, never=[MEDIA, 11])
    groups = engine.generate(prompts(), seeds(3, 64), Sampling(30))
    drawn = {token for group in groups for response in group for token in response.tokens}
    assert not drawn & {MEDIA, 11} and {10, 12} <= drawn


def test_only_responses_are_supervised():
    prompt = prompts()[0]
    sample = trajectory(prompt, torch.tensor([3, 4]))
    assert [label for label in sample.labels.tolist() if label != IGNORE] == [3, 4]


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.2, 0.0, 0.3])).repeat(20_000, 1)
    draws = uniform(np.arange(20_000, dtype=np.uint64), position=3)
    share = torch.bincount(sample_tokens(logits, 1.0, draws), minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.2, 0.0, 0.3]), atol=0.012, rtol=0)
    cold = torch.bincount(sample_tokens(logits, 0.5, draws), minlength=4) / 20_000
    torch.testing.assert_close(cold, torch.tensor([0.25, 0.04, 0.0, 0.09]) / 0.38, atol=0.012, rtol=0)


def test_draws_differ_between_positions_and_seeds():
    numbers = np.concatenate([uniform(np.arange(100, dtype=np.uint64), position) for position in range(100)])
    assert len(np.unique(numbers)) == 10_000
    assert abs(numbers.mean() - 0.5) < 0.01 and numbers.min() >= 0 and numbers.max() < 1


def test_unequal_groups_are_refused(engine):
    with pytest.raises(ValueError, match="same number of seeds"):
        engine.generate(prompts()[:2], [[1, 2], [3]], Sampling(4))
