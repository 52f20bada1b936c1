"""The client of a vLLM server, against a fake one that fails in every way."""

import io
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_vllm import MEDIA, STOP, FakeVLLM
from PIL import Image

from kimivl.data.pack import IGNORE, EncodedSample
from kimivl.data.sample import Sample
from kimivl.rl.repetition import Repetition
from kimivl.rl.types import Policy, Problem, Request, Sampling
from kimivl.rl.vllm_requests import Writing, collapsed
from kimivl.rl.vllm_server import VLLMServerRolloutEngine
from kimivl.rl.vllm_stream import ServerError


def png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def problem(number: int, *sizes: tuple[int, int]) -> Problem:
    """A problem whose images have these sizes in units of 28 pixels, which are tokens."""
    ids = [11, 12, *(id_ for w, h in sizes for id_ in [*[MEDIA] * (w * h), 13]), 14 + number]
    tensor = torch.tensor(ids)
    prompt = EncodedSample(
        tensor,
        torch.full_like(tensor, IGNORE),
        torch.zeros(sum(4 * w * h for w, h in sizes), 3, 14, 14, dtype=torch.uint8),
        torch.tensor([[2 * h, 2 * w] for w, h in sizes]).reshape(-1, 2),
    )
    images = tuple(png(28 * w, 28 * h) for w, h in sizes)
    return Problem(number, Sample(f"sample-{number}", [], images, "1"), prompt)


def tensors() -> dict[str, torch.Tensor]:
    stack = torch.arange(24.0).reshape(2, 3, 4)
    return {
        "a.weight": torch.ones(3, 2),
        "e.0.weight": stack[0],
        "e.1.weight": stack[1],
        "x.rotary_emb.inv_freq": stack,
    }


@pytest.fixture
def fake():
    with FakeVLLM() as server:
        yield server


@pytest.fixture
def weights():
    return tensors()


@pytest.fixture
def engine(fake, weights, tmp_path):
    model = SimpleNamespace(media_id=MEDIA, official_tensors=lambda: weights)
    policy = Policy(model, decode=str, stop_id=STOP, pad_id=0, never=(MEDIA,))
    return VLLMServerRolloutEngine(policy, fake.url, in_flight=4, backoff=0.01, retries=2, sync_dir=str(tmp_path))


def stops(fake: FakeVLLM) -> bool:
    """Whether the server soon writes nothing any more."""
    until = time.monotonic() + 30
    while fake.running and time.monotonic() < until:
        time.sleep(0.01)
    return not fake.running


def requests(count: int = 9, **fields) -> list[Request]:
    problems = [problem(0), problem(1, (2, 1)), problem(2, (1, 1), (2, 2))]
    return [Request(problems[n % 3], seed=1000 + n, **fields) for n in range(count)]


SAMPLING = Sampling(12)


def test_responses_are_what_the_server_writes(engine, fake):
    asked = requests()
    responses = engine.generate(asked, SAMPLING)
    for request, response in zip(asked, responses, strict=True):
        assert list(response.tokens) == fake.tokens(request.seed, 12)
        assert response.logp.tolist() == [-float(token) for token in response.tokens]
        assert response.stop == ("stop" if response.tokens[-1] == STOP else "length")
        assert response.text == str([token for token in response.tokens if token != STOP])
    assert {response.stop for response in responses} == {"stop", "length"}
    assert engine.tokens_per_second > 0 and fake.most <= 4
    assert all(body["sampling_params"]["logit_bias"] == {str(MEDIA): -100.0} for body in fake.bodies)


def test_the_mass_of_masked_ids_is_counted_again(engine, fake):
    """The server draws from p without the placeholder's share; the trainer's log-probability is of all ids."""
    logits = torch.tensor([0.3, 1.2, -0.5, 0.9])
    biased = torch.log_softmax((logits - torch.tensor([0.0, 0.0, 0.0, 100.0])) / 0.7, 0)
    writing = Writing(requests(1)[0], Sampling(4, temperature=0.7), engine.policy)
    found = writing.unmasked(float(biased[1]), [float(biased[3])])
    assert found == pytest.approx(float(torch.log_softmax(logits / 0.7, 0)[1]), abs=1e-4)


def test_images_arrive_with_the_pixels_of_the_sample_and_one_placeholder_each(engine, fake):
    [asked] = [request for request in requests(3) if len(request.problem.sample.images) == 2]
    engine.generate([asked], SAMPLING)
    assert fake.bodies[0]["token_ids"] == [11, 12, MEDIA, 13, MEDIA, 13, 16]
    for sent, image in zip(fake.pixels, asked.problem.sample.images, strict=True):
        assert np.array_equal(np.asarray(sent), np.asarray(Image.open(io.BytesIO(image))))


def test_a_prompt_that_is_read_otherwise_names_its_sample(engine, fake):
    fake.other_grid = True
    with pytest.raises(ValueError, match="'sample-1': vLLM reads 7 prompt tokens, the trainer 6.*image processor"):
        engine.generate(requests()[1:2], SAMPLING)


def test_a_prompt_without_the_placeholders_of_its_images_is_refused():
    whole = problem(1, (2, 1))
    assert collapsed(whole, MEDIA) == [11, 12, MEDIA, 13, 15]
    for ids in ([11, MEDIA, 13], [11, MEDIA, MEDIA, 13, MEDIA], [11, 12]):
        broken = EncodedSample(torch.tensor(ids), torch.tensor(ids), torch.zeros(0), whole.prompt.image_grid_hws)
        with pytest.raises(ValueError, match="'sample-1'.*placeholders"):
            collapsed(Problem(1, whole.sample, broken), MEDIA)


def test_a_response_goes_on_from_its_prefix_within_its_budget(engine, fake):
    [whole] = engine.generate(requests(1), SAMPLING)
    prefix = (20, 21, 22)
    [gone_on] = engine.generate(requests(1, prefix=prefix, budget=4), SAMPLING)
    assert gone_on.tokens[:3] == prefix and np.isnan(gone_on.logp[:3]).all() and not np.isnan(gone_on.logp[3:]).any()
    assert fake.bodies[-1]["token_ids"][-3:] == list(prefix)
    assert gone_on.stop == ("stop" if STOP in gone_on.tokens else "budget") and len(gone_on) <= 7
    assert gone_on.tokens[3:] != whole.tokens[:4], "its draws are not those of its beginning"
    [full] = engine.generate(requests(1, prefix=tuple(range(10, 22))), SAMPLING)
    assert full.stop == "length" and len(full) == 12


def test_a_response_that_repeats_itself_is_dropped_at_the_server(engine, fake):
    fake.tokens = lambda seed, count: list(itertools.islice(itertools.cycle([20, 21]), count))
    fake.pace, fake.max_model_len = 0.05, 4096  # whole responses would take 100 s
    sampling = Sampling(2000, repetition=Repetition(times=4, min_tokens=16))
    responses = engine.generate(requests(4), sampling)
    assert {response.stop for response in responses} == {"repetition"}
    assert {len(response) for response in responses} == {16}
    assert stops(fake) and fake.written < 4 * 2000


@pytest.mark.parametrize("fault", ["fail", "cut"])
def test_what_fails_once_is_asked_again_and_comes_out_the_same(engine, fake, fault):
    wanted = [response.tokens for response in engine.generate(requests(), SAMPLING)]
    setattr(fake, fault, 2)
    assert [response.tokens for response in engine.generate(requests(), SAMPLING)] == wanted
    assert len(fake.bodies) >= 2 * 9 + 1


def test_a_server_that_dies_is_named_and_nothing_answered_is_lost(engine, fake):
    engine.in_flight = 1
    stream = engine.stream(requests(), SAMPLING)
    got = [next(stream) for _ in range(3)]
    fake.fail = 100
    with pytest.raises(ServerError, match=rf"{fake.url} does not answer.*503.*vllm serve.*type the command again"):
        got += list(stream)
    assert len({number for number, _ in got}) == len(got) >= 3
    fake.fail = 0
    assert len(engine.generate(requests(2), SAMPLING)) == 2


def test_no_server_at_all(engine, fake):
    engine.url, engine.retries = "http://127.0.0.1:9", 1
    with pytest.raises(ServerError, match=r"127.0.0.1:9 does not answer .*vllm serve MODEL_FOLDER.*rollout.url"):
        engine.generate(requests(), SAMPLING)


def test_a_request_that_is_refused_for_good_names_its_sample(engine, fake):
    fake.fail, fake.status = 1, 400
    with pytest.raises(ValueError, match="'sample-0': .* refuses it with 400: .*not now"):
        engine.generate(requests(1), SAMPLING)
    fake.fail, fake.status = 1, 403
    with pytest.raises(ServerError, match="answers 403: start it with: .*--enable-scale-out"):
        engine.generate(requests(1), SAMPLING)
    with pytest.raises(ValueError, match="'sample-0': .* max_model_len is 64; raise"):
        engine.generate(requests(1), Sampling(100))


def test_weights_are_pushed_once_and_checked(engine, fake, weights, tmp_path):
    assert engine.sync()["perf/sync_s"] > 0
    assert fake.weights.keys() == {name for name in weights if "inv_freq" not in name}
    assert all(torch.equal(fake.weights[name], weights[name]) for name in fake.weights)
    assert fake.resets == ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    engine.sync()
    assert fake.loads == 1, "the same weights are not sent twice"
    weights["e.1.weight"][0, 0] += 1
    engine.sync()
    assert fake.loads == 2 and torch.equal(fake.weights["e.1.weight"], weights["e.1.weight"])
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_large_models_are_sent_in_several_files(engine, fake, weights, monkeypatch):
    monkeypatch.setattr("kimivl.rl.vllm_server._SHARD_BYTES", 40)
    engine.sync()
    assert all(torch.equal(fake.weights[name], weights[name]) for name in fake.weights) and len(fake.weights) == 3


def test_weights_that_arrive_wrong_are_found(engine, fake):
    fake.wrong = "e.0.weight"
    with pytest.raises(RuntimeError, match="1 of 3 tensors in worker 0 of http.* the first is e.0.weight"):
        engine.generate(requests(), SAMPLING)
    fake.wrong = ""
    engine.sync()
    assert fake.loads == 2


def test_a_server_that_was_started_anew_is_found(engine, fake):
    engine.generate(requests(), SAMPLING)
    fake.token = ""
    with pytest.raises(ServerError, match="has lost this run's weights"):
        engine.generate(requests(), SAMPLING)
    engine.sync()  # the next one brings them
    assert fake.loads == 2 and len(engine.generate(requests(), SAMPLING)) == 9


def test_a_server_that_comes_back_without_the_weights_does_not_go_on(engine, fake):
    engine.in_flight = 1
    stream = engine.stream(requests(), SAMPLING)
    next(stream)
    fake.cut, fake.token = 1, "of another run"
    with pytest.raises(ServerError, match="has lost this run's weights"):
        list(stream)


@pytest.mark.parametrize(
    ("switch", "message"), [("no_dev_mode", "is missing.*VLLM_SERVER_DEV_MODE=1"), ("no_extension", "PolicyWorker")]
)
def test_a_server_without_the_right_flags_is_told_them(engine, fake, switch, message):
    setattr(fake, switch, True)
    with pytest.raises(ServerError, match=message + ".*--worker-extension-cls kimivl.rl.vllm_worker.PolicyWorker"):
        engine.sync()


def test_a_stream_that_is_closed_early_stops_the_server(engine, fake):
    fake.tokens = lambda seed, count: [20, STOP] if seed == 1000 else [20] * count
    fake.pace, fake.max_model_len = 0.05, 4096  # all but the first would take 100 s
    stream = engine.stream(requests(), Sampling(2000))
    next(stream)
    stream.close()
    assert stops(fake) and len(fake.bodies) < 9


def test_a_sync_waits_for_the_responses_of_another_thread(engine, fake, weights):
    engine.sync()
    fake.pace = 0.01
    loads: list[int] = []

    def generate() -> None:
        loads.extend(fake.loads for _ in engine.stream(requests(), SAMPLING))

    thread = threading.Thread(target=generate)
    thread.start()
    while not fake.bodies:
        time.sleep(0.001)
    weights["a.weight"] += 1
    engine.sync()
    thread.join()
    assert fake.loads == 2 and loads == [1] * 9  # all of them were there before the new weights
    stream = engine.stream(requests(), SAMPLING)
    next(stream)
    with pytest.raises(RuntimeError, match="finish or close the stream first"):
        engine.sync()
    stream.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "rollout.url=localhost:8000"),
        ({"in_flight": 0}, "in_flight >= 1"),
        ({"sync_dir": "/nowhere"}, "rollout.sync_dir=/nowhere: there is no such folder"),
    ],
)
def test_settings_that_cannot_be(engine, settings, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerRolloutEngine(engine.policy, **settings)
