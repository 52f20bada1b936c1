"""A second model that looks at each right trace: which behaviours does it really show?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from kimivl.data.chat import THINK_CLOSE
from kimivl.data.sample import Sample
from kimivl.rl.rollout import RolloutEngine
from kimivl.rl.types import Policy

_VERDICT = re.compile(r"^\W*(\w+)\W*[:=]\W*(yes|no)\b", re.IGNORECASE | re.MULTILINE)

TEMPLATE = """\
Below is a problem and the reasoning of somebody who solved it. Decide for each behaviour whether the reasoning truly \
shows it; a word that only sounds like it is not enough.
planning: the steps are laid out before they are taken
evaluation: an intermediate result is tested, not only stated
reflection: a mistake is noticed and mended
exploration: more than one way to the result is tried
Answer with one line for each of {names}, such as `planning: yes` or `planning: no`, and nothing else.

PROBLEM
{question}

REASONING
{thinking}
"""


class Judge:
    """Which model judges, and what it is asked.

    Args:
        rollout: (policy) -> engine; usually ``kimivl.rl.openai_engine.OpenAIEngine``, which needs no policy.
        template: of the question, with the places {names}, {question} and {thinking}.
        max_new_tokens: of a judgement.
    """

    def __init__(
        self,
        rollout: Callable[[Policy | None], RolloutEngine],
        template: str = TEMPLATE,
        max_new_tokens: int = 1024,
    ) -> None:
        for place in ("{question}", "{thinking}", "{names}"):
            if place not in template:
                raise ValueError(f"synthesize.judge.template has no place {place}")
        self.rollout = rollout
        self.template = template
        self.max_new_tokens = max_new_tokens

    def question(self, problem: Sample, question: str, thinking: str, names: Iterable[str]) -> Sample:
        """What the judge is asked about a trace, the pictures of the problem with it."""
        text = self.template
        for place, value in (("names", ", ".join(names)), ("question", question), ("thinking", thinking)):
            text = text.replace("{" + place + "}", value)
        content: list[dict[str, Any]] = [{"type": "image"}] * len(problem.images) + [{"type": "text", "text": text}]
        return Sample(problem.key, [{"role": "user", "content": content}], problem.images)

    @staticmethod
    def read(text: str, names: Iterable[str]) -> dict[str, bool] | None:
        """The judgement behind the thinking of a response, or None where it does not speak of every behaviour."""
        for mark in ("</think>", THINK_CLOSE):
            text = text.rpartition(mark)[2]
        said = {name.lower(): answer.lower() == "yes" for name, answer in _VERDICT.findall(text)}
        names = list(names)
        return {name: said[name] for name in names} if all(name in said for name in names) else None
