from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from kimivl.model.segments import BLOCK, Segments

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def test_of_cumulative_lengths():
    segments = Segments.of(torch.tensor([0, 3, 8, 13, 17]))
    assert segments.lengths == [3, 5, 5, 4] and segments.tokens == 17 and segments.max_length == 5
    assert segments.runs == ((1, 3), (2, 5), (1, 4))
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]]


@given(LENGTHS)
def test_of_lengths_equals_of_their_sums(lengths):
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    one, other = Segments.of(ends, sum(lengths)), Segments.of_lengths(lengths, "cpu")
    assert torch.equal(one.cu_seqlens, other.cu_seqlens) and one.lengths == other.lengths == lengths
    assert one.numbers.bincount().tolist() == lengths
    assert [length for count, length in one.runs for _ in range(count)] == lengths


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([], "rise from 0 to the 8 tokens"),
        ([0], "rise from 0 to the 8 tokens"),
        ([0, 4], "rise from 0 to the 8 tokens"),
        ([1, 8], "rise from 0 to the 8 tokens"),
        ([0, 4, 4, 8], "got 0 tokens in segment 1; leave out empty samples"),
        ([0, 8, 4, 8], "got -4 tokens in segment 1"),
        ([[0, 8]], "rise from 0 to the 8 tokens"),
    ],
)
def test_wrong_sums_are_named(ends, message):
    with pytest.raises(ValueError, match=message):
        Segments.of(torch.tensor(ends, dtype=torch.int32), 8)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_no_empty_segments(lengths):
    with pytest.raises(ValueError, match="at least one token each"):
        Segments.of_lengths(lengths, "cpu")


@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=10)
@given(lengths=LENGTHS)
@example(lengths=[BLOCK, 2 * BLOCK, 1])
@example(lengths=[3, 2 * BLOCK - 3])
@example(lengths=[2 * BLOCK])
def test_block_mask_is_that_of_all_pairs(causal, lengths):
    """Against `create_block_mask`, which evaluates the mask at every pair of tokens."""
    segments = Segments.of_lengths(lengths, "cpu")
    ours = segments.block_mask(causal)
    tokens = segments.tokens
    plain = create_block_mask(ours.mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
    assert ours.seq_lengths == plain.seq_lengths and ours.BLOCK_SIZE == plain.BLOCK_SIZE
    for kind in ("kv", "q", "full_kv", "full_q"):
        counts, expected = getattr(ours, f"{kind}_num_blocks"), getattr(plain, f"{kind}_num_blocks")
        assert torch.equal(counts, expected) and counts.dtype == expected.dtype, kind
        rows = zip(getattr(ours, f"{kind}_indices")[0, 0], getattr(plain, f"{kind}_indices")[0, 0], strict=True)
        for (visited, same), count in zip(rows, counts[0, 0], strict=True):
            assert torch.equal(visited[:count], same[:count]), kind


def test_block_mask_is_built_once_and_small():
    segments = Segments.of_lengths([100_000, 28_000], "cpu")
    mask = segments.block_mask(causal=True)
    assert segments.block_mask(causal=True) is mask and segments.block_mask(causal=False) is not mask
    assert max(x.numel() for x in mask.as_tuple() if isinstance(x, torch.Tensor)) <= (128_000 // BLOCK) ** 2
