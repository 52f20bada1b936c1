"""One training sample or problem: a chat, its encoded images and, where it is verifiable, its answer.

On disk a sample is `KEY.json` plus `KEY.0.png`, `KEY.1.jpg`, ... (see `shards.py`). The JSON object holds
`messages` and, optionally, `answer`, `difficulty`, `source` and `task`:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read it."}]},
                  {"role": "assistant", "content": "\\\\boxed{37}"}],
     "answer": "37", "difficulty": 2, "source": "digits", "task": "read"}

A problem for reinforcement learning has no assistant turn.
"""

import io
import json
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image

ROLES = ("system", "user", "assistant")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


class SampleError(ValueError):
    """A sample that cannot be used; `reason` is the name under which it is counted (`data/dropped/<reason>`).

    Reasons raised in this package: bad_json, bad_image, image_count, empty_answer, missing_member, duplicate_key,
    too_large, truncated_shard, bad_shard, io_error (and special_token, too_long where a chat is encoded).
    """

    def __init__(self, reason: str, key: str, shard: str | None, detail: str) -> None:
        self.reason = reason
        self.key = key
        self.shard = shard
        self.detail = detail
        sample = f"sample {key!r}" if key else "a sample"
        place = f"{sample} of {shard}" if shard else sample
        super().__init__(f"{place}: {detail} [{reason}]")

    def __reduce__(self) -> tuple[type, tuple[str, str, str | None, str]]:
        """Errors cross process borders (data workers), so they are rebuilt from their four parts."""
        return (type(self), (self.reason, self.key, self.shard, self.detail))


class _Fault(Exception):
    """What is wrong with a sample, before its name is added."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


MAX_DIFFICULTY = 32_767
"""What a 16-bit column of the index holds."""

_IMAGE_NAME = re.compile(rf"([0-9]{{1,6}})\.({'|'.join(IMAGE_SUFFIXES)})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Sample:
    """A chat with its images.

    `messages` is normalised: each content is a list of parts `{"type": "image"}` or
    `{"type": "text", "text": str}`; the n-th image part belongs to the n-th entry of `images` (encoded
    bytes).
    `answer` is the exact expected answer, `difficulty` a label from easy (small) to hard.
    """

    key: str
    messages: list[dict[str, Any]]
    images: tuple[bytes, ...] = ()
    answer: str | None = None
    difficulty: int | None = None
    source: str = ""
    task: str = ""


def parse_sample(key: str, members: dict[str, bytes], shard: str | None = None, *, check_images: bool = True) -> Sample:
    """The sample made of `members` (extension -> bytes, such as `json` and `0.png`), checked.

    Image headers, PNG checksums and JPEG end marks are checked, unless `check_images` says that these bytes have
    been checked before; pixels are not decoded here. Raises SampleError with the reason, the key and the shard.
    """
    try:
        fields = _json_object(members)
        messages = [_message(entry) for entry in fields["messages"]]
        images = _images(members, check_images)
        _check_turns(messages, images)
        answer, difficulty = fields.get("answer"), fields.get("difficulty")
        if answer is not None and (not isinstance(answer, str) or not answer.strip()):
            raise _Fault("empty_answer", f"'answer' must be a non-empty string, not {answer!r:.120}")
        _check_characters(answer or "", "'answer'")
        if difficulty is not None and (type(difficulty) is not int or not 0 <= difficulty <= MAX_DIFFICULTY):
            raise _Fault(
                "bad_json", f"'difficulty' must be an integer from 0 to {MAX_DIFFICULTY}, not {difficulty!r:.120}"
            )
        source, task = (_text_field(fields, name) for name in ("source", "task"))
    except _Fault as fault:
        raise SampleError(fault.reason, key, shard, fault.detail) from fault
    return Sample(key, messages, images, answer, difficulty, source, task)


def _json_object(members: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise _Fault("missing_member", f"no .json member, only {sorted(members)}")
    try:
        fields = json.loads(members["json"])
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; brackets without end
        raise _Fault("bad_json", f"the .json member is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _Fault("bad_json", f"the .json member must be an object, not {type(fields).__name__}")
    if not isinstance(fields.get("messages"), list) or not fields["messages"]:
        raise _Fault("bad_json", "'messages' must be a non-empty list")
    return fields


def _text_field(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise _Fault("bad_json", f"{name!r} must be a string, not {value!r:.120}")
    _check_characters(value, repr(name))
    return value


def _check_characters(text: str, name: str) -> None:
    """A text with half of a character in it can be neither tokenised nor written to a file."""
    try:
        text.encode()  # 20 times as fast as to search for one
    except UnicodeEncodeError as error:
        raise _Fault("bad_json", f"{name} has a lone surrogate (half of a character)") from error


def _message(entry: Any) -> dict[str, Any]:
    """One message with its content as a list of parts."""
    if not isinstance(entry, dict) or entry.get("role") not in ROLES:
        raise _Fault("bad_json", f"a message needs a 'role' out of {ROLES}, got {entry!r:.120}")
    content = entry.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _Fault("bad_json", f"'content' must be a string or a list of parts, got {content!r:.120}")
    return {"role": entry["role"], "content": [_part(part) for part in content]}


def _part(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        _check_characters(part["text"], "the text")
        return {"type": "text", "text": part["text"]}
    raise _Fault("bad_json", f"a part is {{type: image}} or {{type: text, text: ...}}, got {part!r:.120}")


def _check_turns(messages: list[dict[str, Any]], images: tuple[bytes, ...]) -> None:
    """A user turn exists, no answer is empty, and image parts and images are equal in number."""
    if not any(message["role"] == "user" for message in messages):
        raise _Fault("bad_json", "there is no user turn")
    places = 0
    for message in messages:
        parts = message["content"]
        places += sum(part["type"] == "image" for part in parts)
        spoken = any(part["type"] == "text" and part["text"].strip() for part in parts)
        if message["role"] == "assistant" and not spoken:
            raise _Fault("empty_answer", "an assistant turn has no text")
    if places != len(images):
        raise _Fault("image_count", f"{places} image parts in the messages, but {len(images)} images")


def _images(members: dict[str, bytes], check: bool) -> tuple[bytes, ...]:
    """The image members in the order of their numbers, which must be 0, 1, 2, ... without a gap."""
    numbered: dict[int, bytes] = {}
    for name, data in members.items():
        found = _IMAGE_NAME.fullmatch(name)
        if found:
            number = int(found[1])
            if number in numbered:
                raise _Fault("image_count", f"two members hold image {number}")
            numbered[number] = data
    for number in range(len(numbered)):
        if number not in numbered:
            raise _Fault("missing_member", f"image {number} is missing, there are {sorted(numbered)}")
        if check:
            _check_image(numbered[number], number)
    return tuple(numbered[number] for number in range(len(numbered)))


def _check_image(data: bytes, number: int) -> None:
    """Cheap faults only: an unknown format, a broken PNG chunk, a JPEG cut before its end mark."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ... on bad bytes
        raise _Fault("bad_image", f"image {number} ({len(data)} bytes) is not readable: {error}") from error
    if data.startswith(JPEG_START) and data.rfind(JPEG_END, len(data) // 2) < 0:
        raise _Fault("bad_image", f"image {number} is a JPEG without its end mark (truncated)")
