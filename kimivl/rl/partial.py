"""Partial rollouts: responses that an iteration's budget left unfinished, and that the next one goes on with.

Source: Kimi k1.5 (arXiv 2501.12599) section 2.6.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from kimivl.rl.experience import Experience
from kimivl.rl.mismatch import Mismatch, compare
from kimivl.rl.types import Problem, Request, Response

OffPolicy = Literal["drop", "importance"]
"""What becomes of tokens that an earlier policy wrote: left out of the loss, or weighed by what the reference makes of
them, ``min(pi_i / mu, cap)``."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One response as far as it is written.

    ``version (len,)`` is the iteration whose policy wrote each token. Example, a budget of 3 from iteration 7 on::

        iteration  tokens          version         next request
        7          a b c           7 7 7           prefix (a b c)
        8          a b c d <end>   7 7 7 8 8       none, it is complete
    """

    seed: int
    response: Response | None = None
    version: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def complete(self) -> bool:
        return self.response is not None and self.response.stop != "budget"

    def request(self, problem: Problem, budget: int | None) -> Request:
        """What an engine is asked for next."""
        return Request(problem, self.seed, () if self.response is None else self.response.tokens, budget)

    def extended(self, response: Response, version: int) -> Draft:
        """With what the engine wrote by the policy of iteration ``version``; ``response`` is whole, as engines give it.

        Raises:
            ValueError: when the engine did not go on from what was written before, or wrote nothing.
        """
        before = self.response
        written = () if before is None else before.tokens
        if response.stop == "error":
            return replace(self, response=response, version=np.full(len(response), version, np.int32))
        if response.tokens[: len(written)] != written:
            raise ValueError(
                f"the rollout engine did not go on from the {len(written)} tokens that it was given; it must return "
                "the whole response, prefix included"
            )
        if response.stop == "budget" and len(response) == len(written):
            raise ValueError("the rollout engine says that a budget is used up, but it has written nothing")
        logp = None if response.logp is None else np.array(response.logp, np.float32)
        if logp is not None and before is not None and before.logp is not None:
            logp[: len(written)] = before.logp
        added = np.full(len(response) - len(written), version, np.int32)
        # The engine routes an unfinished response anew when it goes on: a checkpoint need not hold its experts.
        experts = None if response.stop == "budget" else response.experts
        whole = replace(response, logp=logp, experts=experts)
        return Draft(self.seed, whole, np.concatenate([self.version, added]))


@dataclass(slots=True)
class OpenGroup:
    """The drafts of one problem (its ``number`` in the index), begun in iteration ``born``."""

    number: int
    born: int
    drafts: list[Draft]

    @property
    def complete(self) -> bool:
        """A group is scored as a whole: its baseline needs every response."""
        return all(draft.complete for draft in self.drafts)

    @property
    def unfinished(self) -> int:
        return sum(not draft.complete for draft in self.drafts)

    @property
    def begun(self) -> bool:
        """Whether anything is written."""
        return any(draft.response is not None for draft in self.drafts)


class PartialRollouts:
    """The buffer of groups that wait for another iteration, oldest first.

    It needs no limit of its own: an iteration goes on with every draft before it opens new groups, and opens no more
    than its problems, so that it holds at most ``data.problems`` groups; and each iteration adds ``data.budget``
    tokens to a draft, so that it waits for at most ``max_new_tokens / budget`` of them before the hard cap ends it.
    """

    def __init__(self) -> None:
        self.groups: dict[int, OpenGroup] = {}

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def unfinished(self) -> int:
        """Responses that wait."""
        return sum(group.unfinished for group in self.groups.values())

    def put(self, groups: Sequence[OpenGroup]) -> None:
        self.groups |= {group.number: group for group in groups}

    def take(self) -> list[OpenGroup]:
        """All groups; the buffer is empty afterwards."""
        taken, self.groups = list(self.groups.values()), {}
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "groups": [
                {"number": group.number, "born": group.born, "drafts": [_draft_state(draft) for draft in group.drafts]}
                for group in self.groups.values()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        groups = [
            OpenGroup(group["number"], group["born"], [_draft_of(draft) for draft in group["drafts"]])
            for group in state["groups"]
        ]
        self.groups = {group.number: group for group in groups}


def _draft_state(draft: Draft) -> dict[str, Any]:
    response = None if draft.response is None else response_state(draft.response)
    return {"seed": draft.seed, "response": response, "version": torch.from_numpy(draft.version)}


def _draft_of(state: Mapping[str, Any]) -> Draft:
    response = None if state["response"] is None else response_of(state["response"])
    return Draft(state["seed"], response, state["version"].numpy())


def response_state(response: Response) -> dict[str, Any]:
    """A response as tensors and primitives, which a checkpoint can hold."""
    return {
        "tokens": torch.tensor(response.tokens, dtype=torch.int32),
        "text": response.text,
        "stop": response.stop,
        "logp": None if response.logp is None else torch.from_numpy(np.asarray(response.logp, np.float32)),
        "experts": None if response.experts is None else torch.from_numpy(np.asarray(response.experts)),
    }


def response_of(state: Mapping[str, Any]) -> Response:
    """The inverse of `response_state`."""
    logp, experts = (None if state[name] is None else state[name].numpy() for name in ("logp", "experts"))
    return Response(tuple(state["tokens"].tolist()), state["text"], state["stop"], logp, experts)


def weigh(experience: Experience, off_policy: OffPolicy, mismatch: Mismatch) -> dict[str, float]:
    """Fill in what each token weighs in the loss, once its reference log-probability is there; returns figures.

    Raises:
        ValueError: when tokens of an earlier policy are to be weighed and the engine gave no log-probabilities.
    """
    if not experience.weight.any():  # an iteration without an admitted group
        return {}
    ref_logp, rollout_logp, segment = experience.ref_logp, experience.rollout_logp, experience.segment
    old = experience.version != experience.iteration
    unknown = old & rollout_logp.isnan()
    if off_policy == "importance" and unknown.any():
        raise ValueError(
            f"data.off_policy=importance: the rollout engine gave no log-probabilities for {int(unknown.sum())} tokens "
            "of an earlier policy; take off_policy=drop, or another rollout="
        )
    figures = compare(rollout_logp, ref_logp, segment, counted=~old if (~old).any() else None)
    if off_policy == "drop":
        experience.weight[old] = 0.0
    elif old.any() and mismatch.importance == "none":
        correction = replace(mismatch, importance="token")(ref_logp, rollout_logp, segment, old.float())
        experience.weight[old] = correction.weight[old]
        figures["policy/off_policy_weight"] = float(correction.weight[old].mean())
    correction = mismatch(ref_logp, rollout_logp, segment, experience.weight)
    experience.weight = correction.weight
    return figures | correction.figures
