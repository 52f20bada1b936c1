"""A vLLM server that several ranks ask: one pushes the weights, all are answered."""

from typing import Any

import torch
from fake_vllm import MEDIA, STOP, FakeVLLM
from in_ranks import in_ranks

from kimivl.data.pack import EncodedSample
from kimivl.data.sample import Sample
from kimivl.rl.types import Policy, Problem, Request, Sampling
from kimivl.rl.verifiers import boxed
from kimivl.rl.vllm_server import VLLMServerRolloutEngine
from kimivl.rl.workers import VerifierPool
from kimivl.runtime import ranks


def problem(number: int) -> Problem:
    ids = torch.arange(10, 14)
    prompt = EncodedSample(ids, ids, torch.zeros(0, 3, 14, 14, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.int64))
    return Problem(number, Sample(f"key-{number}", [], (), "1"), prompt)


class Model:
    media_id = MEDIA

    def official_tensors(self) -> dict[str, torch.Tensor]:
        return {"a.weight": torch.full((3, 2), float(ranks.rank()))}  # those of the first are pushed


def ask(url: str) -> dict[str, Any]:
    policy = Policy(Model(), decode=str, stop_id=STOP, pad_id=0, never=(MEDIA,))
    engine = VLLMServerRolloutEngine(policy, url, in_flight=5, backoff=0.01, retries=1)
    found: dict[str, Any] = {"in_flight": engine.in_flight, "workers": VerifierPool(boxed, 3).workers}
    try:
        engine.generate([], Sampling(4))
    except RuntimeError as error:
        found["unsynced"] = str(error)
    engine.sync()
    seeds = range(ranks.rank(), 8, ranks.world_size())
    text = [Request(problem(n), seed=1000 + n) for n in seeds]
    found["tokens"] = {r.seed: a.tokens for r, a in zip(text, engine.generate(text, Sampling(12)), strict=True)}
    engine.sync()  # nothing has changed
    ranks.gather(None)
    if ranks.is_first():
        engine.url = "http://127.0.0.1:9"
    try:
        engine.sync()
    except ValueError as error:
        found["gone"] = type(error).__name__, str(error)
    return found


def test_all_ranks_ask_and_one_pushes_the_weights():
    with FakeVLLM() as fake:
        first, second = in_ranks(ask, fake.url)
        drawn = first["tokens"] | second["tokens"]
        assert fake.loads == 1 and len(drawn) == 8 and len(first["tokens"]) == 4
        assert all(list(tokens) == fake.tokens(seed, 12) for seed, tokens in drawn.items())
    assert float(fake.weights["a.weight"].sum()) == 0
    assert first["in_flight"] == second["in_flight"] == 3  # of five in all, rounded up
    assert first["workers"] == second["workers"] == 2
    assert "before sync(), which all ranks must call" in second["unsynced"]
    assert first["gone"][0] == "ServerGone" and second["gone"][0] == "PeerFailed"
    assert second["gone"][1].startswith("rank 0: http://127.0.0.1:9 does not answer")
