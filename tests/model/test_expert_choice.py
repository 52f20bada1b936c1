"""Configurations whose experts cannot be chosen."""

from __future__ import annotations

import pytest

from kimivl.model import KimiVLConfig

BAD = {
    "more chosen than there are": ({"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
    "groups of unequal size": ({"n_group": 3}, "n_routed_experts 8 must be a multiple of n_group 3"),
    "groups of one": ({"n_group": 8}, "2 or more in a group"),
    "no group": ({"n_group": 0}, "n_group 0"),
    "more groups kept than there are": ({"n_group": 2, "topk_group": 3}, "topk_group 3"),
    "too few in the groups kept": ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "the 2 experts"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_choice_of_experts_that_cannot_be_made_is_refused(recipe, change, message):
    fields = recipe("tiny")
    with pytest.raises(ValueError, match=rf"text_config.*{message}") as error:
        KimiVLConfig(**fields | {"text_config": fields["text_config"] | change})
    assert "\n" not in str(error.value)
