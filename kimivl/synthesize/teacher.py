"""The teacher: a local model behind a rollout engine, or an endpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kimivl.data.chat import SampleEncoder
from kimivl.inference import load_inference, weights_digest
from kimivl.model import Kernels
from kimivl.rl.openai_engine import OpenAIEngine
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Policy


@dataclass(frozen=True, slots=True)
class Teacher:
    """Who answers.

    ``encoder`` makes its prompts; None for an engine that reads text and pictures itself. ``settings`` by the key that
    a user types: another teacher is told by them.
    """

    engine: RolloutEngine
    encoder: SampleEncoder | None
    settings: dict[str, Any]


def make_teacher(
    rollout: Callable[[Policy], RolloutEngine],
    init_from: str | None,
    student: SampleEncoder,
    kernels: Kernels | None = None,
    precision: str | None = None,
    accelerator: str | None = None,
) -> Teacher:
    """The teacher that ``rollout`` (waiting for its policy) and ``init_from`` describe; ``student`` counts tokens.

    Raises:
        ValueError: there is no model in ``init_from``, or a wrong setting of an endpoint.
    """
    if is_endpoint(rollout):
        tokenizer = student.tokenizer

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        policy = Policy(None, tokenizer.decode, student.stop_id, tokenizer.pad_token_id, encode=encode)
        engine = rollout(policy)
        assert isinstance(engine, OpenAIEngine)
        return Teacher(engine, None, {"rollout.model": engine.model, "rollout.extra": engine.extra})
    if init_from is None:
        raise ValueError("init_from is null: name the model folder of the teacher, or an endpoint with rollout=openai")
    inference = load_inference(init_from, rollout, kernels, precision, accelerator)
    return Teacher(inference.engine, inference.encoder, {"init_from": weights_digest(init_from)})


def is_endpoint(rollout: Callable[..., RolloutEngine]) -> bool:
    """Whether an engine reads text and pictures itself, and needs no model of this machine."""
    made = getattr(rollout, "func", rollout)
    return isinstance(made, type) and issubclass(made, OpenAIEngine)
