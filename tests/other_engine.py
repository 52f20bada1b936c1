"""An engine that is sure that it disagrees with the trainer: its log-probabilities are 1 lower than they should be."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kimivl.rl.hf import HFRolloutEngine
from kimivl.rl.types import Request, Response, Sampling


class OtherEngine(HFRolloutEngine):
    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Response]]:
        for number, response in super().stream(requests, sampling):
            assert response.logp is not None
            yield number, replace(response, logp=response.logp - 1)
