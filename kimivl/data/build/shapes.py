"""The shapes in which chats are published, and what a sample makes of each.

| shape | told by | example |
|---|---|---|
| LLaVA | `conversations` of from / value, `image` | `llava` |
| ShareGPT, LLaMA-Factory | `conversations` or `messages`, `images`, `system` | `sharegpt` |
| OpenAI | `messages` whose contents are lists of parts | `openai` |
| problem | `problem`, `question` or `prompt` | `problem` |

In every shape `<image>` in a text marks the place of the next image of the row (a newline beside the mark belongs to
the mark), and the images of a row without any mark go before the first user text.
"""

import base64
import binascii
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

Reference = bytes | str
"""An image: its bytes, or its path as the row gives it."""

Fields = dict[str, Any]
Turn = tuple[str, Any]  # role, content (a string or a list of parts)

SPEAKERS = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
QUESTIONS = ("problem", "question", "prompt")
ACCEPTED = "conversations (LLaVA, ShareGPT), messages (OpenAI, LLaMA-Factory), or problem / question / prompt + answer"

MARK = "<image>"
_MARK = re.compile(rf"\n?{MARK}\n?")


class Refusal(Exception):
    """Why a row makes no sample; `reason` is the name under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class Draft:
    """A sample before its images are read: the JSON member's fields, and the images in the order of their places."""

    fields: Fields
    images: list[Reference]


def draft(row: Fields, source: str = "") -> Draft:
    """The sample that `row` describes; `source` is its origin where the row names none.

    Raises Refusal: unknown_shape, bad_json, image_count, bad_image, missing_member or remote_image.
    """
    row = {name: value for name, value in row.items() if not _absent(value)}
    chat = _shape(row)(row)
    for name in ("answer", "difficulty", "source", "task"):
        if name in row:
            chat.fields[name] = row[name]
    answer, difficulty = row.get("answer"), row.get("difficulty")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        chat.fields["answer"] = str(answer)
    if isinstance(difficulty, float) and difficulty.is_integer():  # a table's column of integers with gaps
        chat.fields["difficulty"] = int(difficulty)
    if source:
        chat.fields.setdefault("source", source)
    return chat


def _absent(value: Any) -> bool:
    """Whether a table says in this way that the row has no such field."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shape(row: Fields) -> Callable[[Fields], Draft]:
    for name in ("conversations", "messages"):
        turns = row.get(name)
        if isinstance(turns, list) and turns:
            if any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns):
                return openai
            return llava if "image" in row else sharegpt
    if any(name in row for name in QUESTIONS):
        return problem
    raise Refusal("unknown_shape", f"a row has the keys {sorted(row)}; accepted are {ACCEPTED}")


def llava(row: Fields) -> Draft:
    """Turns of from / value and one image or several.

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}
    """
    return sharegpt({**row, "images": row["image"]})


def sharegpt(row: Fields) -> Draft:
    """Turns of from / value or of role / content, a list of images and a system text.

    {"system": "Be brief.", "images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>What is it?"},
                                                              {"role": "assistant", "content": "A cat."}]}
    """
    turns = [_turn(entry) for entry in row.get("conversations") or row["messages"]]
    return _chat(turns, _row_images(row), row.get("system", ""))


def openai(row: Fields) -> Draft:
    """Turns whose content is a string or a list of parts; an image part holds its image or takes the row's next.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]}
    """
    return sharegpt(row)


def problem(row: Fields) -> Draft:
    """A question with its exact answer, for reinforcement learning: one user turn, no assistant turn.

    {"problem": "<image>How many dots?", "answer": "4", "images": ["a.png"], "difficulty": 2, "task": "count"}
    """
    name = next(name for name in QUESTIONS if name in row)
    if "answer" not in row:
        raise Refusal("unknown_shape", f"a row has {name!r} but no 'answer', only {sorted(row)}; accepted: {ACCEPTED}")
    question = row[name]
    turns = [_turn(entry) for entry in question] if isinstance(question, list) else [("user", question)]
    return _chat(turns, _row_images(row), row.get("system", ""))


def _turn(entry: Any) -> Turn:
    if isinstance(entry, dict):
        speaker = entry.get("from") or entry.get("role")
        content = entry.get("value") if entry.get("content") is None else entry["content"]
        if isinstance(speaker, str) and speaker in SPEAKERS:
            return SPEAKERS[speaker], content
    raise Refusal("bad_json", f"a turn needs 'from' or 'role' out of {sorted(SPEAKERS)}, got {entry!r:.120}")


def _row_images(row: Fields) -> list[Reference]:
    images = row.get("images", row.get("image"))
    entries = images if isinstance(images, list) else [] if images in (None, "") else [images]
    return [_reference(entry) for entry in entries]


def _chat(turns: list[Turn], images: list[Reference], system: Any) -> Draft:
    """The turns with every image in its place."""
    if system and not any(role == "system" for role, _ in turns):
        turns = [("system", system), *turns]
    waiting = iter(images)
    messages = [(role, list(_parts(content, waiting))) for role, content in turns]
    left = list(waiting)
    if left and len(left) < len(images):
        raise Refusal("image_count", f"{len(images) - len(left)} marks for {len(images)} images")
    for role, parts in messages:
        if role == "user":
            parts[:0], left = left, []
            break
    if left:
        raise Refusal("bad_json", "there is no user turn for the row's images")
    placed = [part for _, parts in messages for part in parts if not isinstance(part, dict)]
    entries = [{"role": role, "content": [_plain(part) for part in parts]} for role, parts in messages]
    return Draft({"messages": entries}, placed)


def _plain(part: Reference | Fields) -> Fields:
    return part if isinstance(part, dict) else {"type": "image"}


def _parts(content: Any, waiting: Iterator[Reference]) -> Iterator[Reference | Fields]:
    """Text parts (dicts) and images of one content, in order; marks take their image from `waiting`."""
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield from _marked(part["text"], waiting)
        elif kind in ("image", "image_url"):
            held = next((part[name] for name in ("image_url", "image", "url", "path") if part.get(name)), None)
            yield _next(waiting) if held is None else _reference(held)
        else:
            raise Refusal("bad_json", f"a content is a text or a list of text and image parts, got {part!r:.120}")


def _marked(text: str, waiting: Iterator[Reference]) -> Iterator[Reference | Fields]:
    for place, piece in enumerate(_MARK.split(text) if MARK in text else [text]):
        if place:
            yield _next(waiting)
        if piece:
            yield {"type": "text", "text": piece}


def _next(waiting: Iterator[Reference]) -> Reference:
    for image in waiting:
        return image
    raise Refusal("image_count", "there are more image marks than images")


def _reference(value: Any) -> Reference:
    """An image as bytes or path, out of what a row holds: bytes, a path, a URL, {"bytes", "path"} or {"url"}."""
    if isinstance(value, dict):
        value = next((value[name] for name in ("bytes", "url", "path") if value.get(name)), None)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise Refusal("missing_member", f"an image must be a path or bytes, got {value!r:.120}")
    scheme = value[: value.find(":")].lower() if ":" in value[:8] else ""
    if scheme == "data":
        return _inline(value)
    if scheme == "file":
        return unquote(urlsplit(value).path)
    if "://" in value:
        raise Refusal("remote_image", f"the image {value:.120} is remote; download it first and give its path")
    return value


def _inline(url: str) -> bytes:
    """The bytes of `data:image/png;base64,...`."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Refusal("bad_image", f"a data URL needs ';base64,', got {head:.60}")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise Refusal("bad_image", f"the data URL {head:.60} is not base64: {error}") from error
