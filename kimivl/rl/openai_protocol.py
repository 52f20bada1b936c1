"""The chat-completions protocol: a problem as the body of a request, and the body of an answer as a reply.

Everything that a server can send is either a ``Reply`` or a ``Refused`` with the reason it is counted under.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from kimivl.data.chat import THINK_CLOSE, THINK_OPEN
from kimivl.data.sample import JPEG_START, Sample

STOPPED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}
CUT = {"length", "max_tokens", "max_length", "model_length"}
"""What servers call an answer that ended by itself, and one that was cut at its cap."""


class Refused(Exception):
    """An attempt that gave no reply.

    Args:
        reason: name under which it is counted. again: whether another attempt may succeed. wait: seconds that the
            server asks for before it. fatal: no request to this server can succeed.
    """

    def __init__(self, reason: str, detail: str, *, again: bool = True, wait: float = 0.0, fatal: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.again = again and not fatal
        self.wait = wait
        self.fatal = fatal


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. ``text`` has the reasoning between think marks where the server sent it apart; ``tokens`` as the
    server counts them, 0 where it does not say."""

    text: str
    stop: Literal["stop", "length"]
    tokens: int = 0


def chat_messages(sample: Sample) -> list[dict[str, Any]]:
    """The turns of a sample in the protocol, images as data URLs; an assistant's last turn is left out."""
    images = iter(sample.images)
    turns = sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages
    return [{"role": turn["role"], "content": [_part(part, images) for part in turn["content"]]} for turn in turns]


def _part(part: dict[str, Any], images: Any) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    data: bytes = next(images)
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg" if data.startswith(JPEG_START) else "webp"
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def parse_json(body: bytes) -> Reply:
    """The reply in an ``application/json`` body. Raises Refused: ``bad_json``, and what ``_reply`` finds."""
    answer = _object(body.decode("utf-8", "replace"))
    _check_error(answer)
    choice = _choice(answer)
    if choice is None:
        raise Refused("empty_choices", "the answer has no choices")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Refused("bad_json", "the choice has no message")
    return _reply(_text(message, "content"), _reasoning(message), choice.get("finish_reason"), _completion(answer))


class StreamedReply:
    """A reply that comes in server-sent events; ``feed`` it lines, then ask for the ``reply``."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._finish: str | None = None
        self._tokens = 0
        self._choices = 0
        self.done = False

    def feed(self, line: str) -> None:
        """Take one line of the stream. Raises Refused for one that is no event of this protocol."""
        if not line.startswith("data:"):  # comments keep a connection alive, names of events say nothing here
            return
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.done = True
            return
        event = _object(data)
        _check_error(event)
        self._tokens = _completion(event) or self._tokens
        choice = _choice(event)
        if choice is None:
            return
        self._choices += 1
        delta = choice.get("delta") or choice.get("message") or {}
        self._content.append(_text(delta, "content") or "")
        self._reasoning.append(_reasoning(delta) or "")
        self._finish = choice.get("finish_reason") or self._finish

    def reply(self) -> Reply:
        """Raises Refused: ``truncated`` where the stream broke off, and what ``_reply`` finds."""
        if self._finish is None and not self.done:
            raise Refused("truncated", "the stream broke off")
        if not self._choices:
            raise Refused("empty_choices", "the stream has no choices")
        return _reply("".join(self._content), "".join(self._reasoning), self._finish, self._tokens)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refused("bad_json", f"the answer is not JSON ({error}): {text[:80]!r}") from error
    if not isinstance(value, dict):
        raise Refused("bad_json", f"the answer is no JSON object: {text[:80]!r}")
    return value


def _check_error(answer: dict[str, Any]) -> None:
    """Some servers send an error with status 200."""
    if answer.get("error"):
        raise Refused("server_error", f"the answer is an error: {json.dumps(answer['error'])[:300]}")


def _choice(answer: dict[str, Any]) -> dict[str, Any] | None:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def _completion(answer: dict[str, Any]) -> int:
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0


def _text(message: dict[str, Any], name: str) -> str | None:
    """A string, or the text parts of a list of parts."""
    value = message.get(name)
    if isinstance(value, list):
        value = "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    if value is not None and not isinstance(value, str):
        raise Refused("bad_json", f"{name} is {type(value).__name__}, not text")
    return value


def _reasoning(message: dict[str, Any]) -> str | None:
    """DeepSeek, SGLang and older vLLM call it reasoning_content; OpenRouter and newer vLLM reasoning."""
    return _text(message, "reasoning_content") or _text(message, "reasoning")


def _reply(content: str | None, reasoning: str | None, finish: Any, tokens: int) -> Reply:
    """Raises Refused: ``null_content`` where nothing was said, ``no_finish_reason``, ``finish_<reason>`` for another
    end than by itself or at the cap."""
    if finish is None:
        # Whether it is whole is not known, and a cut trace would teach a model never to stop.
        raise Refused("no_finish_reason", "the answer does not say why it ended")
    if finish not in STOPPED | CUT:
        raise Refused(f"finish_{finish}", f"the answer ended with finish_reason {finish!r}", again=False)
    cut = finish in CUT
    if not content and not (cut and reasoning):
        raise Refused("null_content", "the answer has no content")
    text = content or ""
    if reasoning:
        # Thinking that was cut has no closing mark; nothing behind it is an answer.
        text = THINK_OPEN + reasoning.strip() + (THINK_CLOSE + text.lstrip() if text else "")
    return Reply(text, "length" if cut else "stop", tokens)


def refusal(status: int, body: str, retry_after: str | None) -> Refused:
    """What an HTTP status that is no success means for the request."""
    detail = f"HTTP {status}: {' '.join(body.split())[:300]}"
    wait = _seconds(retry_after)
    if status in (401, 403, 404):
        return Refused(f"http_{status}", detail, fatal=True)
    if status in (408, 409, 425, 429) or status >= 500:
        return Refused(f"http_{status}", detail, wait=wait)
    return Refused(f"http_{status}", detail, again=False)


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header: a number of seconds or a date; 0 where it says nothing that can be read."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
