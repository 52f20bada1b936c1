"""Write the digits task: shards of three stages, held-out problems and a tokenizer trained on its text."""

import fcntl
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from kimivl.data import shards
from kimivl.data.sample import Sample
from kimivl.model import tokenizer
from kimivl.tasks.digits.chains import chain
from kimivl.tasks.digits.questions import THRESHOLDS, Problem, ask, draw_operands
from kimivl.tasks.digits.scans import Cells, compose, draw_splits, png

MANIFEST = "digits.json"
LOCK = ".digits.lock"
MAX_DIGITS = 8
ALL_DIGITS = tuple(range(1, MAX_DIGITS + 1))
# Stage 1: reading must be a large part, or later chains misread the picture.
DIRECT_MIXTURE = {
    "read": 0.27,
    "sentence": 0.08,
    "backwards": 0.10,
    "sum": 0.17,
    "count": 0.09,
    "largest": 0.06,
    "text_sum": 0.08,
    "addition": 0.15,
}
# Stages 2 and 3 and the held-out problems: mostly sums, where a chain helps most; some without a picture.
REASONING_MIXTURE = {"sum": 0.62, "count": 0.13, "largest": 0.07, "backwards": 0.06, "text_sum": 0.12}
SPLITS = {"sft": "train", "long_cot": "train", "rl": "train", "val": "val", "test": "test"}
HELD_OUT_SHARE = 8  # one in so many text-only sums is kept for val and test
TOKENIZER_TEXTS = 4000  # of each of the first two stages
CHAT_WORDS = (
    "system",
    "You are a helpful assistant",
    "user",
    "image",
    "assistant",
)  # added by the chat format


def write(
    out: str | Path,
    seed: int = 0,
    sft: int = 19200,
    long_cot: int = 8000,
    rl: int = 2048,
    val: int = 160,
    test: int = 384,
    vocab_size: int = 400,
    redundant: float | None = None,
    hasty: float = 0.0,
    digits: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write `sft-*.tar`, `long_cot-*.tar`, `rl-*.tar`, `val-*.tar`, `test-*.tar` and `tokenizer/` into `out`.

    Numbers are samples per set. `redundant` and `hasty` make the chains of `long_cot` longer or shorter than they
    should be (see `chain`). `digits` says of some sets how many digits their samples have, in turn; the others have 1
    to 8. The bytes follow from the settings. A folder that was finished with the same settings is left as it is; any
    other content of these names is rebuilt whole. Of several processes that write one folder at once, one works and
    the others wait for it. Returns `out`.
    """
    out = Path(out)
    sizes = {"sft": sft, "long_cot": long_cot, "rl": rl, "val": val, "test": test}
    settings = {"code": _code_digest(), "seed": seed, "sizes": sizes, "vocab_size": vocab_size}
    settings |= {"chains": {"redundant": redundant, "hasty": hasty}, "digits": _check_digits(digits or {})}
    if _finished(out, settings):
        return out
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _finished(out, settings):
            _clear(out)
            _build(out, settings)
    return out


def _build(out: Path, settings: dict[str, Any]) -> None:
    cells = draw_splits(settings["seed"])
    texts: list[str] = []
    written: list[Path] = []
    for name, size in settings["sizes"].items():
        counts = settings["digits"].get(name, ALL_DIGITS)
        samples = generate(name, size, cells[SPLITS[name]], settings["seed"], counts, **settings["chains"])
        written += shards.write_shards(_overhear(samples, texts), out / name)
    tokenizer.train_tokenizer(texts, settings["vocab_size"]).save_pretrained(out / "tokenizer")
    _write_manifest(out, settings, written)


def generate(
    name: str,
    size: int,
    cells: Cells,
    seed: int,
    counts: Sequence[int] = ALL_DIGITS,
    **chains: Any,
) -> Iterator[Sample]:
    """The `size` samples of a set; sft and long_cot with an answer turn, the others as problems without one.

    Samples have `counts` digits in turn: by default difficulties are equally many. No two are the same problem.
    `chains` are arguments of `chain`.
    (Two-number additions have digits of their own, and small text-only sums run out.)
    """
    mixture = DIRECT_MIXTURE if name == "sft" else REASONING_MIXTURE
    taken: set[tuple[Any, ...]] = set()
    for index in range(size):
        rng = Random(f"{seed}/{name}/{index}")
        count = counts[index % len(counts)]
        kind = _kind(mixture, index, len(counts), count)
        for attempt in itertools.count():
            # The few small text-only problems are used up first; after some vain tries one digit is added.
            problem, places = _draw(kind, min(count + attempt // 20, MAX_DIGITS), cells, SPLITS[name], rng)
            question = ask(problem, rng)
            if (question, places) not in taken:
                break
        taken.add((question, places))
        thought = chain(problem, rng, **chains) if name == "long_cot" else None
        reply = problem.reply if name == "sft" else thought
        yield _sample(name, index, problem, question, reply, cells, places)


def _kind(mixture: Mapping[str, float], index: int, turn: int, count: int) -> str:
    """The kind of sample `index`; shares come out evenly for each place of a turn (golden-ratio steps)."""
    block, place = divmod(index, turn)
    position = (block * 0.6180339887498949 + place / turn) % 1.0
    bounds = itertools.accumulate(mixture.values())
    kind = next(name for name, bound in zip(mixture, bounds, strict=True) if position < bound or bound > 0.999)
    # One-digit text sums are worth a few samples of stage 1 only.
    return "sum" if kind == "text_sum" and count == 1 and mixture is REASONING_MIXTURE else kind


def _draw(kind: str, count: int, cells: Cells, split: str, rng: Random) -> tuple[Problem, tuple[int, ...]]:
    """A problem and the cells it shows (none for a text-only one)."""
    if kind in ("text_sum", "addition"):
        while True:
            numbers = draw_operands(rng) if kind == "addition" else tuple(rng.choices(range(10), k=count))
            if _reserved_for(numbers) == split:
                return Problem(kind, numbers), ()
    places = tuple(rng.sample(range(len(cells.labels)), count))
    threshold = rng.choice(THRESHOLDS) if kind == "count" else -1
    return Problem(kind, tuple(cells.labels[list(places)].tolist()), threshold), places


def _reserved_for(numbers: tuple[int, ...]) -> str:
    """The split a text-only sum belongs to: a held-out problem is never trained on in any phrasing."""
    if len(numbers) == 1 or max(numbers) > 9:
        return "train"
    lot = zlib.crc32(bytes(numbers)) % (2 * HELD_OUT_SHARE)
    return {0: "val", 1: "test"}.get(lot, "train")


def _sample(
    name: str,
    index: int,
    problem: Problem,
    question: str,
    reply: str | None,
    cells: Cells,
    places: tuple[int, ...],
) -> Sample:
    images = (png(compose(cells.pixels[list(places)])),) if places else ()
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    if reply is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    key = f"{name}-{index:06d}"
    return Sample(key, messages, images, problem.answer, problem.difficulty, source="digits", task=problem.kind)


def _check_digits(digits: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """`digits` as the manifest keeps it."""
    for name, counts in digits.items():
        if name not in SPLITS or not counts or not set(counts) <= set(ALL_DIGITS):
            raise ValueError(
                f"data.prepare.digits.{name}={list(counts)}: give numbers of digits from 1 to {MAX_DIGITS} for one of "
                f"{', '.join(SPLITS)}"
            )
    return {name: list(counts) for name, counts in digits.items()}


def _overhear(samples: Iterator[Sample], texts: list[str]) -> Iterator[Sample]:
    """Pass samples on; the chats of the first of them, when they have an answer, are kept in `texts`."""
    for sample in itertools.islice(samples, TOKENIZER_TEXTS):
        if sample.messages[-1]["role"] == "assistant":
            said = [part["text"] for turn in sample.messages for part in turn["content"] if part["type"] == "text"]
            texts += [*said, *CHAT_WORDS]
        yield sample
    yield from samples


def _code_digest() -> str:
    """A digest of the sources that make the content, so that a folder of an older version is rebuilt."""
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(shards.__file__), Path(tokenizer.__file__)]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the manifest has these settings and every file it lists is there in its size."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if not isinstance(manifest, dict) or manifest.get("settings") != settings:
        return False
    files = manifest.get("files", {})
    return bool(files) and all((out / n).is_file() and (out / n).stat().st_size == s for n, s in files.items())


def _clear(out: Path) -> None:
    """Take away what an earlier call wrote, the manifest first."""
    (out / MANIFEST).unlink(missing_ok=True)
    for pattern in (*(f"{name}-*.tar" for name in SPLITS), ".*.partial"):
        for path in out.glob(pattern):
            path.unlink()
    shutil.rmtree(out / "tokenizer", ignore_errors=True)


def _write_manifest(out: Path, settings: dict[str, Any], written: list[Path]) -> None:
    """Written last and at once: without it the folder counts as unfinished."""
    paths = [*written, *sorted((out / "tokenizer").iterdir())]
    files = {str(path.relative_to(out)): path.stat().st_size for path in paths}
    partial = out / f".{MANIFEST}.partial"
    partial.write_text(json.dumps({"settings": settings, "files": files}, indent=2) + "\n")
    partial.replace(out / MANIFEST)
