"""The HTTP engine against a teacher that fails in every way: nothing hangs or is lost, each failure has a name."""

import base64
import json
import logging
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from fake_teacher import (
    ENDLESS_S,
    SAID,
    answer,
    drips,
    events,
    fake_teacher,
    free_port,
    good,
    raw,
    reset,
    says,
    silent,
    status,
    truncated,
)

from kimivl.data.pack import EncodedSample
from kimivl.data.sample import Sample, SampleError
from kimivl.rl.openai_engine import EndpointError, OpenAIEngine
from kimivl.rl.types import Policy, Problem, Request, Sampling

PNG = b"\x89PNG\r\n\x1a\nnot really"
SAMPLING = Sampling(64, 0.7)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def requests(count: int, images: tuple[bytes, ...] = ()) -> list[Request]:
    empty = torch.zeros(0, dtype=torch.long)
    nothing = EncodedSample(empty, empty, torch.zeros(0, 3, 14, 14, dtype=torch.uint8), torch.zeros(0, 2))
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "3+4=?"}]
    sample = Sample("p", [{"role": "user", "content": content}], images, "7")
    return [Request(Problem(number, sample, nothing), seed=2**40 + number) for number in range(count)]


def engine(url: str, **settings) -> OpenAIEngine:
    return OpenAIEngine(None, url, "m", **({"backoff": 0.01, "max_wait": 0.05, "timeout": 5.0} | settings))


@pytest.mark.parametrize("streaming", [True, False])
def test_responses_arrive_whole_with_the_request_as_it_was_meant(streaming):
    with fake_teacher(good) as teacher:
        asking = engine(teacher.url, streaming=streaming, extra={"top_p": 0.9, "seed": None})
        found = asking.generate(requests(5, (PNG,)), SAMPLING)
    assert [response.text for response in found] == [SAID] * 5
    assert {response.stop for response in found} == {"stop"}
    assert found[0].tokens == () and found[0].logp is None
    assert asking.tokens_per_second > 0
    body = teacher.asked[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("m", 64, 0.7, 0.9)
    assert "seed" not in body
    picture, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "3+4=?"}
    kind, data = picture["image_url"]["url"].split(",")
    assert (kind, base64.b64decode(data)) == ("data:image/png;base64", PNG)


def test_each_request_has_its_own_seed_that_any_server_takes():
    with fake_teacher(good) as teacher:
        engine(teacher.url).generate(requests(6), SAMPLING)
    seeds = [body["seed"] for body in teacher.asked]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**31 for seed in seeds)


def test_tokens_come_from_the_students_tokenizer():
    policy = Policy(None, str, 0, 0, encode=lambda text: [1] * len(text.split()))
    with fake_teacher(good) as teacher:
        (response,) = OpenAIEngine(policy, teacher.url, "m").generate(requests(1), SAMPLING)
    assert response.tokens == (1,) * len(SAID.split())


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_is_sent_apart_is_put_between_marks(streaming, name):
    with fake_teacher(says("\n\\boxed{7}", **{name: "Plan: add. 3+4=7.\n"})) as teacher:
        (response,) = engine(teacher.url, streaming=streaming).generate(requests(1), SAMPLING)
    assert response.text == "◁think▷Plan: add. 3+4=7.◁/think▷\\boxed{7}"


def test_a_response_cut_at_the_cap_is_no_finished_one():
    with fake_teacher(says("◁think▷3+4", "length")) as teacher:
        (response,) = engine(teacher.url).generate(requests(1), SAMPLING)
    assert response.stop == "length" and not response.finished


def test_thinking_that_was_cut_has_no_closing_mark():
    with fake_teacher(says("", "length", reasoning_content="3+4 is")) as teacher:
        (response,) = engine(teacher.url).generate(requests(1), SAMPLING)
    assert (response.text, response.stop) == ("◁think▷3+4 is", "length")


PASSING = {
    "http_500": status(500),
    "http_429": status(429, Retry_After="0"),
    "http_503": status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "connection_lost": reset,
    "truncated": truncated,
    "bad_json": raw(b"<html>busy</html>"),
    "bad_json 2": raw(b"[1]"),
    "bad_json 3": raw(json.dumps({"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}).encode()),
    "bad_json 4": raw(json.dumps({"choices": [{"text": "x", "finish_reason": "stop"}]}).encode()),
    "content_type": raw(b"busy", "text/html"),
    "empty_choices": raw(b'{"choices": []}'),
    "empty_choices 2": raw(b'{"choices": null}'),
    "null_content": raw(json.dumps(answer(None)).encode()),
    "no_finish_reason": raw(json.dumps(answer(finish=None)).encode()),
    "server_error": raw(b'{"error": {"message": "overloaded"}}'),
    "truncated 2": raw(events(SAID, None, done=False), "text/event-stream"),
    "bad_json 5": raw(b"data: {'a'\n\n", "text/event-stream"),
    "empty_choices 3": raw(b"data: [DONE]\n\n", "text/event-stream"),
}


@pytest.mark.parametrize("reason", PASSING)
def test_a_passing_failure_is_tried_again_and_counted(reason):
    act = PASSING[reason]
    with fake_teacher(lambda number, body: act if number == 0 else good) as teacher:
        asking = engine(teacher.url, concurrent=1)
        found = asking.generate(requests(2), SAMPLING)
    assert [response.text for response in found] == [SAID] * 2
    assert asking.failures == {reason.split()[0]: 1}
    assert len(teacher.asked) == 3


@pytest.mark.parametrize("reason", PASSING)
def test_a_lasting_failure_is_an_error_of_that_request_alone(reason):
    act, key = PASSING[reason], reason.split()[0]

    def choose(number, body):
        return act if body["seed"] % 2 else good

    with fake_teacher(choose) as teacher:
        found = engine(teacher.url, retries=1, concurrent=2).generate(requests(6), SAMPLING)
    assert [response.stop for response in found] == ["stop", "error"] * 3
    assert all(response.text.startswith(f"{key}: ") for response in found[1::2])


@pytest.mark.parametrize("act", [silent, drips])
def test_a_server_that_never_ends_costs_its_timeout(act):
    with fake_teacher(lambda number, body: act if number == 0 else good) as teacher:
        started = time.monotonic()
        asking = engine(teacher.url, timeout=1.5)
        assert asking.generate(requests(1), SAMPLING)[0].text == SAID
        assert time.monotonic() - started < ENDLESS_S / 2
    assert asking.failures == {"timeout": 1}


def test_a_request_that_the_server_will_never_take_is_not_tried_again():
    def choose(number, body):
        return status(400, "image too large") if body["seed"] % 2 else good

    with fake_teacher(choose) as teacher:
        found = engine(teacher.url, concurrent=1).generate(requests(2), SAMPLING)
    assert found[0].text == SAID
    assert found[1].text == "http_400: HTTP 400: image too large"
    assert len(teacher.asked) == 2


class Unreadable(Sequence):
    """Requests of which those before ``bad`` cannot be made."""

    def __init__(self, count: int, bad: int) -> None:
        self.made, self.bad = requests(count), bad

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, number):
        if number < self.bad:
            raise SampleError("bad_image", "p", None, "it cannot be read")
        return self.made[number]


def test_problems_that_cannot_be_read_say_nothing_about_the_endpoint():
    with fake_teacher(good) as teacher:
        found = engine(teacher.url, concurrent=1, give_up=3).generate(Unreadable(7, 6), SAMPLING)
    assert [response.stop for response in found] == ["error"] * 6 + ["stop"]
    assert found[0].text.startswith("bad_image: ")


def test_a_problem_that_is_refused_for_each_of_its_samples_does_not_end_it():
    def choose(number, body):
        return status(400, "too long") if number < 6 else good

    asked = [Request(Problem(place // 6, one.problem.sample, one.problem.prompt), place)
             for place, one in enumerate(requests(12))]  # fmt: skip
    with fake_teacher(choose) as teacher:
        found = engine(teacher.url, concurrent=1, give_up=3).generate(asked, SAMPLING)
    assert [response.stop for response in found] == ["error"] * 6 + ["stop"] * 6


def test_an_endpoint_that_refuses_every_problem_is_given_up():
    with fake_teacher(status(400, "max_tokens is too large")) as teacher:
        with pytest.raises(EndpointError, match="refused 3 problems.*max_tokens is too large"):
            engine(teacher.url, concurrent=1, give_up=3).generate(requests(50), SAMPLING)
        assert len(teacher.asked) == 3


def test_a_filtered_answer_is_an_error():
    with fake_teacher(says("no", "content_filter")) as teacher:
        (response,) = engine(teacher.url).generate(requests(1), SAMPLING)
    assert response.text.startswith("finish_content_filter")


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_key_ends_it_at_once_and_is_never_said(code, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    caplog.set_level(logging.DEBUG)
    said = "OPENAI_API_KEY holds a key that it does not take"
    refuses = status(code, "Incorrect API key provided: sk-secret.")
    with fake_teacher(refuses) as teacher, pytest.raises(EndpointError, match=said) as error:
        engine(teacher.url, concurrent=1).generate(requests(50), SAMPLING)
    assert len(teacher.asked) == 1
    assert teacher.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(error.value) + caplog.text


def test_a_key_that_is_not_set_is_named():
    with fake_teacher(status(401)) as teacher, pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
        engine(teacher.url).generate(requests(1), SAMPLING)
    assert "Authorization" not in teacher.headers[0]


def test_a_model_that_is_not_there_ends_it_at_once():
    with fake_teacher(status(404, "no such model")) as teacher, pytest.raises(EndpointError, match=r"rollout\.model=m"):
        engine(teacher.url).generate(requests(9), SAMPLING)


def test_a_dead_endpoint_is_given_up_with_its_address_and_nothing_is_lost():
    def choose(number, body):
        return good if number < 5 else reset

    found = []
    with fake_teacher(choose) as teacher, pytest.raises(EndpointError, match="failed 3 requests") as error:
        for _, response in engine(teacher.url, retries=1, concurrent=1, give_up=3).stream(requests(50), SAMPLING):
            found.append(response)
    assert teacher.url in str(error.value) and "type the command again" in str(error.value)
    assert [response.stop for response in found] == ["stop"] * 5 + ["error"] * 3


def test_a_closed_port_is_a_dead_endpoint():
    with pytest.raises(EndpointError, match="no_connection"):
        engine(f"http://127.0.0.1:{free_port()}/v1", retries=1, give_up=2).generate(requests(4), SAMPLING)


def test_it_waits_for_a_server_that_comes_back():
    port, served = free_port(), []

    def serve_later():
        while not asking.failures["no_connection"]:
            time.sleep(0.01)
        with fake_teacher(good, port) as teacher:
            served.append(teacher)
            done.wait(60)

    done = threading.Event()
    asking = engine(f"http://127.0.0.1:{port}/v1", retries=1000)
    thread = threading.Thread(target=serve_later)
    thread.start()
    found = asking.generate(requests(4), SAMPLING)
    done.set()
    thread.join()
    assert [response.text for response in found] == [SAID] * 4
    assert asking.failures["no_connection"] > 0


def test_retry_after_holds_everybody_back():
    with fake_teacher(lambda number, body: status(429, Retry_After="0.4") if number == 0 else good) as teacher:
        engine(teacher.url, concurrent=1, max_wait=9.0).generate(requests(3), SAMPLING)
    assert teacher.times[1] - teacher.times[0] >= 0.4


def test_no_more_requests_in_flight_than_allowed():
    under_way, counts, three = [], [], threading.Event()

    def slow(handler, body):
        under_way.append(body)
        counts.append(count := len(under_way))
        if count >= 3:
            three.set()
        three.wait(5)  # until there are as many as may be
        time.sleep(0.03)
        under_way.pop()
        good(handler, body)

    with fake_teacher(slow) as teacher:
        engine(teacher.url, concurrent=3).generate(requests(12), SAMPLING)
    assert max(counts) == 3


def test_a_consumer_that_leaves_ends_the_run():
    with fake_teacher(good) as teacher:
        stream = engine(teacher.url, concurrent=2).stream(requests(500), SAMPLING)
        next(stream)
        stream.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "openai-engine"]
        asked = len(teacher.asked)
    assert len(teacher.asked) <= asked + 2 < 500  # the two that were under way may reach the server late


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "rollout.url=localhost:8000"),
        ({"url": None}, "rollout.url=None"),
        ({"model": ""}, "rollout.model"),
        ({"concurrent": 0}, "concurrent"),
        ({"policy": Policy(object(), str, 0, 0)}, "rollout=hf"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OpenAIEngine(**({"policy": None, "url": "http://h/v1", "model": "m"} | settings))


def test_the_address_may_be_whole_and_its_password_is_not_shown():
    asking = engine("https://me:secret@host:99/v1/chat/completions/")
    assert asking.url == "https://me:secret@host:99/v1/chat/completions"
    assert asking.shown_url == "https://host:99/v1/chat/completions"
