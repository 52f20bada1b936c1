"""A whole synthesis against a teacher in a thread: what is kept, what is refused and why, and how it goes on."""

import json
import re
from collections import defaultdict
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from fake_teacher import fake_teacher, good, reset, says, status
from rich.console import Console

from kimivl.checkpoint import load_processor
from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.sample import Sample
from kimivl.data.scan import build_index
from kimivl.data.shards import expand, parse_span, scan_shard, write_shards
from kimivl.data.storage import Storage
from kimivl.model.tokenizer import text_encoder, train_tokenizer
from kimivl.rl.openai_engine import OpenAIEngine
from kimivl.rl.rewards import Reward
from kimivl.stages.long_cot.datamodule import check_chain
from kimivl.synthesize import Checks, Judge, Selection, Synthesis
from kimivl.synthesize.teacher import make_teacher
from kimivl.tasks.digits.scans import png

PROMPTS = {"plain": {}, "thorough": {"system": "You are thorough.", "suffix": "Plan first, then check. Use \\boxed{}."}}
RIGHT = "<think>Plan: add. 3+4=7. Check: 4+3=7, the same.</think>\\boxed{7}"
OTHER = "<think>First count on from three: four, five, six. 3+4=7, so that is it.</think>The sum is \\boxed{7}."


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> SampleEncoder:
    folder = tmp_path_factory.mktemp("student")
    train_tokenizer([RIGHT, OTHER], 300).save_pretrained(folder)
    processor = load_processor(folder)
    return SampleEncoder(processor.tokenizer, processor.image_processor, text_encoder(processor.tokenizer))


@pytest.fixture
def index(tmp_path: Path, student: SampleEncoder) -> Index:
    picture = png(__import__("numpy").zeros((28, 28), "uint8"))

    def problem(number: int) -> Sample:
        content = [{"type": "image"}, {"type": "text", "text": f"Problem {number}: what is 3+4?"}]
        return Sample(f"p{number}", [{"role": "user", "content": content}], (picture,), "7", 2, "sums")

    write_shards(map(problem, range(3)), tmp_path / "problems" / "rl")
    shards = expand(str(tmp_path / "problems"))
    return build_index(shards, student, Storage(), prompts=True, workers=1)


@pytest.fixture
def synthesis(index: Index, student: SampleEncoder, tmp_path: Path, request, monkeypatch):
    """A synthesis into ``tmp_path/out`` with some settings changed; one test has the picture drawn."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr("kimivl.synthesize.synthesis.draw_report", lambda report, path: None)

    def make(url: str, engine: dict | None = None, checks: dict | None = None, **settings) -> Synthesis:
        fast = {"backoff": 0.01, "max_wait": 0.05, "retries": 1, "concurrent": 2} | (engine or {})
        rollout = partial(OpenAIEngine, url=url, model="m", **fast)
        known = {"samples": 2, "prompts": PROMPTS, "selection": Selection("all")}
        return Synthesis(
            index,
            student,
            partial(make_teacher, rollout, None, student),
            Reward(),
            tmp_path / "out",
            Console(quiet=True),
            Checks(**({"min_tokens": 1} | (checks or {}))),
            **(known | settings),
        )

    return make


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(out: Path) -> list[Sample]:
    storage = Storage()
    found = []
    for shard in expand(str(out)):
        for record in scan_shard(storage, shard, pytest.fail):
            found.append(parse_span(storage.read(shard, record.offset, record.size), shard))
    return found


def in_turn(*texts: str):
    """A teacher that says the texts in turn to each problem, in whatever order the requests for them arrive."""
    turns = defaultdict(count)

    def choose(number, body):
        problem = re.search(r"Problem \d", json.dumps(body))[0]
        return says(texts[next(turns[problem]) % len(texts)])

    return choose


def test_the_sample_is_the_problem_and_the_trace_and_nothing_of_the_prompt(synthesis, index, tmp_path):
    with fake_teacher(says(RIGHT)) as teacher:
        report = synthesis(teacher.url, samples=2).run()
    assert report["kept"] == 3 and report["rejected"] == {"duplicate": 3}
    for sample in samples(tmp_path / "out"):
        original = index.read(int(sample.key[1]))
        assert sample.messages[:-1] == original.messages
        assert sample.images == original.images
        assert (sample.answer, sample.difficulty, sample.source) == ("7", 2, "sums")
        check_chain(sample)
        assert "Plan first" not in json.dumps(sample.messages) and "thorough" not in json.dumps(sample.messages)
    asked = [json.dumps(body["messages"]) for body in teacher.asked]
    assert sum("Plan first" in text for text in asked) == 3  # half of them, and each with its picture
    assert all("data:image/png;base64," in text for text in asked)


REFUSED = {
    "wrong_answer": "<think>3+4=8, as the plan said first.</think>\\boxed{8}",
    "think_marks": "3+4=7 \\boxed{7}",
    "no_answer": "<think>3+4=7</think>  ",
    "no_thinking": "<think> </think>\\boxed{7}",
    "language_mixing": "<think>计划：把三和四加起来，三加四等于七。3+4=7</think>\\boxed{7}",
    "special_token": "<think>Plan: 3+4=7<|im_end|></think>\\boxed{7}",
    "repetition": f"<think>Plan: {'3+4=7, ' * 60}</think>\\boxed{{7}}",
    "prompt_leak": "<think>As instructed, I plan first. 3+4=7</think>\\boxed{7}",
    "behaviours": "<think>3+4=7</think>\\boxed{7}",
    "too_long": f"<think>Plan: {' '.join(map(str, range(400)))} so 3+4=7</think>\\boxed{{7}}",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_each_fault_has_its_reason_and_its_text_is_kept(reason, synthesis, tmp_path):
    from kimivl.rl.repetition import Repetition

    with fake_teacher(says(REFUSED[reason])) as teacher:
        report = synthesis(teacher.url, samples=1, checks={"repetition": Repetition(), "max_tokens": 900}).run()
    assert report["rejected"] == {reason: 3} and report["kept"] == 0
    refused = rows(tmp_path / "out" / "rejected.jsonl")
    assert [row["reason"] for row in refused] == [reason] * 3
    assert all(row["text"] == REFUSED[reason] and row["detail"] for row in refused)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_cut_response_is_refused_whatever_it_says(synthesis):
    with fake_teacher(says(RIGHT, "length")) as teacher:
        report = synthesis(teacher.url, samples=1).run()
    assert report["rejected"] == {"cut": 3} and report["right"] == 0


def test_a_finished_synthesis_asks_for_nothing_and_writes_the_same(synthesis, tmp_path):
    with fake_teacher(in_turn(RIGHT, OTHER, REFUSED["wrong_answer"])) as teacher:
        first = synthesis(teacher.url, samples=3).run()
        shard = (tmp_path / "out" / "long_cot-000000.tar").read_bytes()
        asked = len(teacher.asked)
        assert synthesis(teacher.url, samples=3).run() == first
        assert len(teacher.asked) == asked == 9
    assert (tmp_path / "out" / "long_cot-000000.tar").read_bytes() == shard


def test_more_samples_ask_for_the_missing_only(synthesis):
    with fake_teacher(says(RIGHT)) as teacher:
        synthesis(teacher.url, samples=2).run()
        report = synthesis(teacher.url, samples=5).run()
    assert len(teacher.asked) == 15 and report["answered"] == 15


def test_a_teacher_that_dies_loses_nothing(synthesis, tmp_path):
    def choose(number, body):
        return good if number < 4 else reset

    with fake_teacher(choose) as teacher, pytest.raises(ValueError, match="type the command again") as error:
        synthesis(teacher.url, {"give_up": 2, "concurrent": 1}, samples=4).run()
    assert teacher.url in str(error.value)
    assert len(rows(tmp_path / "out" / "responses.jsonl")) == 4
    assert [row["error"].split(":")[0] for row in rows(tmp_path / "out" / "failed.jsonl")] == ["connection_lost"] * 2
    with fake_teacher(good) as teacher:
        report = synthesis(teacher.url, samples=4).run()
    assert len(teacher.asked) == 8 and report["answered"] == 12


def test_failed_requests_are_counted_and_asked_again(synthesis):
    def choose(number, body):
        return status(400, "bad picture") if number == 2 else good

    with fake_teacher(choose) as teacher:
        report = synthesis(teacher.url, samples=2).run()
        assert report["failed"] == {"http_400": 1} and (report["wanted"], report["answered"]) == (6, 5)
        report = synthesis(teacher.url, samples=2).run()
    assert report["failed"] == {} and report["answered"] == 6 and len(teacher.asked) == 7


def test_a_kill_in_the_middle_of_a_line_costs_that_response(synthesis, tmp_path):
    with fake_teacher(good) as teacher:
        synthesis(teacher.url).run()
        journal = tmp_path / "out" / "responses.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])
        report = synthesis(teacher.url).run()
    assert len(teacher.asked) == 7 and report["answered"] == 6
    assert len(rows(journal)) == 6


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"temperature": 0.5}, "synthesize.temperature"),
        ({"max_new_tokens": 99}, "synthesize.max_new_tokens"),
        ({"seed": 4}, "synthesize.seed"),
        ({"prompts": {"plain": {"suffix": "Think."}}}, "synthesize.prompts"),
        ({"engine": {"extra": {"top_p": 0.5}}}, "rollout.extra"),
    ],
)
def test_other_settings_are_refused_by_their_key(change, key, synthesis):
    with fake_teacher(good) as teacher:
        synthesis(teacher.url).run()
        with pytest.raises(ValueError, match=key):
            synthesis(teacher.url, **change).run()
    assert len(teacher.asked) == 6


def test_the_responses_can_be_sifted_again_with_other_checks_and_no_teacher(synthesis):
    with fake_teacher(in_turn(RIGHT, OTHER)) as teacher:
        before = synthesis(teacher.url).run()
    after = synthesis("http://127.0.0.1:9/v1", checks={"required": ["evaluation"]}, ask=False).run()
    assert before["kept"] == 6 and after["kept"] == 3 and after["rejected"] == {"behaviours": 3}
    with pytest.raises(ValueError, match=r"synthesize\.prompts"):
        synthesis("http://127.0.0.1:9/v1", ask=False, prompts={"plain": {"suffix": "x"}}).run()


@pytest.fixture
def picture():
    """Marks the test that wants one."""


@pytest.mark.usefixtures("picture")
def test_every_response_is_accounted_for(synthesis, tmp_path):
    texts = [RIGHT, OTHER, *REFUSED.values()]
    with fake_teacher(in_turn(*texts)) as teacher:
        report = synthesis(teacher.url, samples=8, selection=Selection("shortest", 1)).run()
    assert report["kept"] + sum(report["rejected"].values()) == report["answered"] == 24
    assert len(rows(tmp_path / "out" / "kept.jsonl")) == report["kept"]
    assert len(rows(tmp_path / "out" / "rejected.jsonl")) == 24 - report["kept"]
    assert sum(row["right"] for row in report["pass_rate_by_problem"].values()) == report["right"]
    assert sum(row["answered"] for row in report["by_prompt"].values()) == 24
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000


def test_a_judge_decides_on_the_behaviours(synthesis, index):
    def judges(handler, body):
        text = body["messages"][0]["content"][-1]["text"]
        planned = "yes" if "Plan:" in text.partition("REASONING")[2] else "no"
        says(f"planning: {planned}\n- **evaluation**: no\nreflection: No\nexploration: no")(handler, body)

    with fake_teacher(in_turn(RIGHT, OTHER)) as teacher, fake_teacher(judges) as second:
        judge = Judge(partial(OpenAIEngine, url=second.url, model="j"))
        report = synthesis(teacher.url, judge=judge).run()
        assert report["kept"] == 3 and report["rejected"] == {"behaviours": 3}
        synthesis(teacher.url, judge=judge).run()
        assert len(second.asked) == 6  # judgements are kept too
    with fake_teacher(says("I cannot say.")) as third:
        judge = Judge(partial(OpenAIEngine, url=third.url, model="other"))
        assert synthesis(teacher.url, judge=judge, ask=False).run()["rejected"] == {"not_judged": 6}


def test_one_folder_is_written_by_one_synthesis(synthesis, tmp_path):
    from kimivl.data.build.partial import claim

    with claim(tmp_path / "out"), pytest.raises(ValueError, match="another"):
        synthesis("http://127.0.0.1:9/v1").run()


def test_a_folder_without_responses_takes_other_settings(synthesis):
    with fake_teacher(status(401)) as teacher, pytest.raises(ValueError, match="refuses"):
        synthesis(teacher.url).run()
    with fake_teacher(good) as teacher:
        assert synthesis(teacher.url, temperature=0.5).run()["answered"] == 6


def test_a_wrong_judge_is_named_before_the_teacher_is_asked(synthesis):
    with fake_teacher(good) as teacher, pytest.raises(ValueError, match="rollout.url"):
        synthesis(teacher.url, judge=Judge(partial(OpenAIEngine, url=None, model="j")))
    assert not teacher.asked
