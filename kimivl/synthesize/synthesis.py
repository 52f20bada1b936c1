"""``kimivl synthesize``: from problems to shards of long chains of thought, in a folder that can be gone on with.

OUT/settings.json      what the responses were asked for with
OUT/responses.jsonl    every response as it came; the rest can be made again from it
OUT/failed.jsonl       requests that gave no response; the next call asks for them again
OUT/judgements.jsonl   what the judge said, where there is one
OUT/long_cot-*.tar     the samples; kept.jsonl says where each comes from
OUT/rejected.jsonl     every other response, with the reason
OUT/report.json, .png  what became of everything
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from kimivl.data.build.partial import claim
from kimivl.data.chat import SampleEncoder
from kimivl.data.index import Index
from kimivl.data.sample import Sample
from kimivl.data.shards import write_shards
from kimivl.model.tokenizer import text_encoder
from kimivl.rl.rewards import Reward
from kimivl.rl.rollout import response_seed
from kimivl.rl.types import Problem, Request, Sampling
from kimivl.synthesize.ask import NO_PROMPT, Asking, Place
from kimivl.synthesize.checks import Checks
from kimivl.synthesize.journal import Journal
from kimivl.synthesize.judge import Judge
from kimivl.synthesize.picture import draw_report
from kimivl.synthesize.prompts import prompt_of, read_prompts
from kimivl.synthesize.report import print_report, summarise
from kimivl.synthesize.select import Selection
from kimivl.synthesize.settings import check_settings
from kimivl.synthesize.sift import Outcome, Sifter
from kimivl.synthesize.teacher import Teacher
from kimivl.synthesize.traces import Unfit, read_trace

NAME = "long_cot"


class Synthesis:
    """One folder of traces.

    Args:
        index: of the problems. student: encoder of the model that is to learn from the traces. teacher: who answers.
        reward: its verifier judges final answers. out: the folder. console: where progress and report go.
        samples: trajectories of each problem. temperature, max_new_tokens: of the draw.
        limit: problems that are answered, drawn at random; None is all.
        ask: False asks for nothing, and sifts what is there.
        batch: requests made at a time for a local engine.
        prompts: name -> {system, prefix, suffix}; used in turn. checks, selection, judge: see there.
    """

    def __init__(
        self,
        index: Index,
        student: SampleEncoder,
        teacher: Callable[[], Teacher],
        reward: Reward,
        out: Path,
        console: Console,
        checks: Checks,
        selection: Selection,
        prompts: Mapping[str, Any],
        judge: Judge | None = None,
        samples: int = 8,
        temperature: float = 1.0,
        max_new_tokens: int = 4096,
        limit: int | None = None,
        ask: bool = True,
        batch: int = 256,
        samples_per_shard: int = 2000,
        seed: int = 0,
    ) -> None:
        counts = {"samples": samples, "limit": limit, "batch": batch, "samples_per_shard": samples_per_shard}
        for key, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"synthesize.{key} must be at least 1, not {value}")
        if temperature == 0 and samples > len(prompts):
            raise ValueError(
                f"synthesize.samples={samples} at temperature 0 gives the same trace again after {len(prompts)} "
                "prompts: raise synthesize.temperature"
            )
        if judge is not None:
            judge.rollout(None).close()  # its settings are checked before the teacher is paid
        self.index, self.student, self.reward, self.out, self.console = index, student, reward, Path(out), console
        self.make_teacher = teacher
        self.checks, self.selection, self.judge = checks, selection, judge
        self.prompts = read_prompts(prompts)
        self.samples, self.asks, self.batch, self.seed = samples, ask, batch, seed
        self.sampling = Sampling(max_new_tokens, temperature, checks.repetition)
        self.samples_per_shard = samples_per_shard
        self.numbers = np.sort(np.random.default_rng(seed).permutation(len(index))[:limit]).tolist()
        keys = index.keys().to_pylist()
        self.keys: list[str] = keys
        self._twice = {key for key, count in Counter(keys).items() if count > 1}
        self.sifter = Sifter(
            index,
            student,
            text_encoder(student.tokenizer),
            reward,
            checks,
            {prompt.name: prompt for prompt in self.prompts},
            self.name_of,
            judge is not None,
        )

    def name_of(self, number: int) -> str:
        """How the keys of a problem's samples begin: its key, with its number where another has it too."""
        key = self.keys[number]
        return f"{key}~{number}" if key in self._twice else key

    @property
    def wanted(self) -> list[Place]:
        return [(number, sample) for number in self.numbers for sample in range(self.samples)]

    def run(self) -> dict[str, Any]:
        """Ask, sift, select, write; returns the report.

        Raises:
            ValueError: the teacher cannot be asked, or OUT is of other settings. What was answered is kept.
        """
        with claim(self.out), Journal(self.out / "responses.jsonl") as journal:
            failed = self._ask(journal)
            places = [place for place in self.wanted if place in journal.places]
            if not places:
                raise ValueError(
                    f"{self.out} holds no response to sift: every request failed ({dict(failed)}; see "
                    f"{self.out / 'failed.jsonl'})"
                    if self.asks
                    else f"{self.out} holds no response; leave ask=false out"
                )
            steps = track(
                self.sifter.sift(journal, places), "sifting", len(places), console=self.console, transient=True
            )
            outcomes = list(steps)
            if self.judge is not None:
                self._judge(journal, outcomes)
            self._select(journal, outcomes)
            return self._write(journal, outcomes, failed)

    # Asking the teacher.

    def _ask(self, journal: Journal) -> Counter[str]:
        if not self.asks:
            check_settings(self.out, self._settings({}), journal.path, asks=False)
            return Counter()
        teacher = self.make_teacher()
        check_settings(self.out, self._settings(teacher.settings), journal.path)
        missing = [place for place in self.wanted if place not in journal.places]
        asking = Asking(
            engine=teacher.engine,
            sampling=self.sampling,
            make=lambda place: self._request(teacher, place),
            batch=self.batch if teacher.encoder else None,
            journal=journal,
            failures=self.out / "failed.jsonl",
            describe=lambda place: {
                "key": self.keys[place[0]],
                "prompt": prompt_of(self.prompts, *place).name,
            },
        )
        try:
            failed = asking.ask(missing, "asking", len(self.wanted) - len(missing), self.console)
        except KeyboardInterrupt:
            self.console.print(f"{len(journal.places):,} responses are in {journal.path}: type the command again")
            raise
        finally:
            teacher.engine.close()
        return failed

    def _settings(self, of_teacher: dict[str, Any]) -> dict[str, Any]:
        """What the responses depend on, by the key that a user types."""
        return of_teacher | {
            "PROBLEM_SHARDS": self.index.digest,
            "synthesize.prompts": {
                prompt.name: [prompt.system, prompt.prefix, prompt.suffix] for prompt in self.prompts
            },
            "synthesize.temperature": self.sampling.temperature,
            "synthesize.max_new_tokens": self.sampling.max_new_tokens,
            "synthesize.seed": self.seed,
        }

    def _request(self, teacher: Teacher, place: Place) -> Request:
        number, sample = place
        asked = prompt_of(self.prompts, number, sample).put(self.index.read(number))
        prompt = teacher.encoder.encode_prompt(asked, self.index.shard_of(number)) if teacher.encoder else NO_PROMPT
        return Request(Problem(number, asked, prompt), response_seed(self.seed, number, sample))

    # The judge.

    def _judge(self, journal: Journal, outcomes: list[Outcome]) -> None:
        """Put the judge's behaviours in the place of the markers', and refuse by them."""
        assert self.judge is not None
        judge, names = self.judge, self.checks.names
        engine = judge.rollout(None)
        by = hashlib.sha256(f"{getattr(engine, 'model', '')}\n{judge.template}\n{names}".encode()).hexdigest()[:16]
        chosen = {outcome.place: outcome for outcome in outcomes if outcome.reason is None}

        def request(place: Place) -> Request:
            problem = self.index.read(place[0])
            question = Problem(place[0], problem, NO_PROMPT).question
            thinking = read_trace(journal.read(journal.places[place])["text"]).thinking
            asked = judge.question(problem, question, thinking, names)
            return Request(Problem(place[0], asked, NO_PROMPT), response_seed(self.seed, *place, 1))

        with Journal(self.out / "judgements.jsonl") as judgements:
            said = {p: judgements.read(where) for p, where in judgements.places.items() if p in chosen}
            missing = [place for place in chosen if said.get(place, {}).get("judge") != by]
            asking = Asking(
                engine,
                Sampling(judge.max_new_tokens, 0.0),
                request,
                None,
                judgements,
                self.out / "failed.jsonl",
                lambda place: {"judge": by},
            )
            try:
                asking.ask(missing, "judging", len(chosen) - len(missing), self.console)
            finally:
                engine.close()
            for place, outcome in chosen.items():
                where = judgements.places.get(place)
                record = judgements.read(where) if where else {}
                self._take_judgement(outcome, record if record.get("judge") == by else {})

    def _take_judgement(self, outcome: Outcome, record: dict[str, Any]) -> None:
        assert self.judge is not None
        shown = self.judge.read(record["text"], self.checks.names) if record.get("stop") == "stop" else None
        try:
            if shown is None:
                raise Unfit("not_judged", "the judge's answer cannot be read" if record else "the judge did not answer")
            outcome.shown = shown
            self.checks.check_behaviours(shown)
        except Unfit as unfit:
            outcome.refuse(unfit)

    # Duplicates, the choice, and the files.

    def _select(self, journal: Journal, outcomes: Iterable[Outcome]) -> None:
        """Among the right traces to the same words and pictures."""
        groups: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            if outcome.reason is None:
                groups[outcome.content].append(outcome)
        for group in groups.values():
            texts = [self._trace(journal, outcome).text for outcome in group]
            reasons = self.selection(texts, [outcome.tokens for outcome in group])
            for outcome, reason in zip(group, reasons, strict=True):
                outcome.reason = reason

    def _trace(self, journal: Journal, outcome: Outcome) -> Any:
        return read_trace(journal.read(journal.places[outcome.place])["text"])

    def _write(self, journal: Journal, outcomes: list[Outcome], failed: Counter[str]) -> dict[str, Any]:
        kept = [outcome for outcome in outcomes if outcome.reason is None]
        paths = write_shards(self._samples(journal, kept), self.out / NAME, self.samples_per_shard)
        _write_lines(self.out / "kept.jsonl", (self._kept_row(outcome) for outcome in kept))
        refused = (outcome for outcome in outcomes if outcome.reason is not None)
        _write_lines(self.out / "rejected.jsonl", (self._rejected_row(journal, outcome) for outcome in refused))
        report = summarise(outcomes, self.checks.names, len(self.wanted), failed)
        report |= {"shards": [path.name for path in paths]}
        (self.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        draw_report(report, self.out / "report.png")
        print_report(report, self.out, self.console)
        return report

    def _samples(self, journal: Journal, kept: Iterable[Outcome]) -> Iterator[Sample]:
        for outcome in kept:
            yield self.sifter.sample(outcome, self.index.read(outcome.place[0]), self._trace(journal, outcome))

    def _kept_row(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "key": f"{self.name_of(outcome.place[0])}-{outcome.place[1]:02d}",
            "problem": outcome.key,
            "prompt": outcome.prompt,
            "thinking_tokens": outcome.thinking,
            "answer_tokens": outcome.answer,
            "behaviours": [name for name, shown in outcome.shown.items() if shown],
        }

    def _rejected_row(self, journal: Journal, outcome: Outcome) -> dict[str, Any]:
        known = {"problem": outcome.key, "sample": outcome.place[1], "prompt": outcome.prompt}
        text = journal.read(journal.places[outcome.place])["text"]
        return known | {"reason": outcome.reason, "detail": outcome.detail, "text": text}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines under ``path``, all or none."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
