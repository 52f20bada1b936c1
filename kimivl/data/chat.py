"""Chats to token ids with a loss mask, in Kimi-VL's chat format (no newlines, no BOS).

A turn is ``<|im_ROLE|>ROLE<|im_middle|>CONTENT<|im_end|>``. Special tokens bound every piece of text, so the text
is tokenised piece by piece and the mask is exact by construction: supervised are the tokens of an assistant's
content and its closing ``<|im_end|>``, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from os.path import commonprefix
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kimivl.data.images import decode_image, image_size
from kimivl.data.pack import IGNORE, EncodedSample
from kimivl.data.sample import Sample, SampleError

FORMAT = 1
"""Raised when the same chat comes out as other tokens than before; old indexes are then stale."""

DEFAULT_SYSTEM = "You are a helpful assistant"
THINK_OPEN, THINK_CLOSE = "◁think▷", "◁/think▷"
"""The marks of a thinking model: ordinary text, not special tokens."""

_THINKING = re.compile(f"{THINK_OPEN}.*?{THINK_CLOSE}", re.DOTALL)
_PATCH_SHAPE = (3, 14, 14)

Grid = tuple[int, int]
"""An image's height and width in patches; four patches are one token."""


class ImagePatcher(Protocol):
    """What the encoder needs of an image processor (``kimivl.model.KimiVLImageProcessor`` has it)."""

    def grid(self, width: int, height: int) -> Grid: ...

    def patches(self, image: Any, out: Tensor | None = None) -> tuple[Tensor, Grid]: ...

    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Counts:
    """What a chat takes of a pack: tokens, image patches, supervised tokens (once shifted), images."""

    tokens: int
    patches: int
    targets: int
    images: int


class SampleEncoder:
    """Turns a ``Sample`` into tensors. Picklable, so that loader workers can carry it.

    Args:
        tokenizer: a transformers tokenizer with Kimi-VL's special tokens.
        image_processor: cuts a picture into uint8 patches and says its grid.
        encode_text: ordinary text to ids (``kimivl.model.tokenizer.text_encoder``); by default the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: ImagePatcher,
        encode_text: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._encode_text = encode_text
        self._headers: dict[str, np.ndarray] = {}

    @property
    def stop_id(self) -> int:
        """The token that ends a turn."""
        return self._special_ids["<|im_end|>"]

    def fingerprint(self) -> str:
        """Of everything that decides what ``measure`` and ``encode`` return."""
        settings = {
            "format": [FORMAT, DEFAULT_SYSTEM, _THINKING.pattern],
            "images": self.image_processor.settings(),
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "text": type(self._encode_text).__qualname__,  # tiktoken's cuts long texts
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def measure(self, sample: Sample, shard: str | None = None, prompt: bool = False) -> Counts:
        """The counts of ``encode``, or of ``encode_prompt``; of images only the headers are read.

        Raises the SampleErrors of ``encode``, except for images that turn out damaged behind their headers.
        """
        grids = self._grids(sample, shard)
        ids, labels = self._ids_and_labels(sample, shard, grids, prompt)
        return Counts(len(ids), _patches(grids), int(np.count_nonzero(labels[1:] != IGNORE)), len(grids))

    def encode(self, sample: Sample, shard: str | None = None, out: Tensor | None = None) -> EncodedSample:
        """The whole chat, supervised on the assistant's answers.

        Args:
            out: (P, 3, 14, 14) uint8, where the image patches are written; ``measure`` tells P.

        Raises:
            SampleError: ``special_token``, ``empty_answer`` or ``bad_image``; ``bad_shard`` when the images do not have
                the patches that ``out`` has room for.
        """
        return self._encode(sample, shard, False, out)

    def encode_prompt(self, sample: Sample, shard: str | None = None) -> EncodedSample:
        """The chat up to the assistant's last turn, opened for it; nothing is supervised."""
        return self._encode(sample, shard, True, None)

    def _encode(self, sample: Sample, shard: str | None, prompt: bool, out: Tensor | None) -> EncodedSample:
        grids = self._grids(sample, shard)
        ids, labels = self._ids_and_labels(sample, shard, grids, prompt)
        return EncodedSample(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            pixel_values=self._pixel_values(sample, shard, grids, out),
            image_grid_hws=torch.from_numpy(np.array(grids, np.int64).reshape(-1, 2)),
        )

    def _grids(self, sample: Sample, shard: str | None) -> list[Grid]:
        sizes = [image_size(image, sample.key, shard) for image in sample.images]
        try:
            return [self.image_processor.grid(*size) for size in sizes]
        except ValueError as error:  # too many patches on a side
            raise SampleError("bad_image", sample.key, shard, str(error)) from error

    def _pixel_values(self, sample: Sample, shard: str | None, grids: list[Grid], out: Tensor | None) -> Tensor:
        """(P, 3, 14, 14) patches of all images, in ``out`` where it is given."""
        wanted = _patches(grids)
        if out is None:
            out = torch.empty(wanted, *_PATCH_SHAPE, dtype=torch.uint8)
        elif len(out) != wanted:
            detail = f"its images have {wanted} patches, but there is room for {len(out)}; make the index anew"
            raise SampleError("bad_shard", sample.key, shard, detail)
        start = 0
        for image, grid in zip(sample.images, grids, strict=True):
            pixels = decode_image(image, sample.key, shard)
            height, width = pixels.shape[:2]
            if (found := self.image_processor.grid(width, height)) != grid:
                detail = f"the image has {found} patches, but its header promised {grid}"
                raise SampleError("bad_image", sample.key, shard, detail)
            end = start + grid[0] * grid[1]
            self.image_processor.patches(pixels, out[start:end])
            start = end
        return out

    def _ids_and_labels(
        self, sample: Sample, shard: str | None, grids: Sequence[Grid], prompt: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(L,) int64 token ids and labels of a chat, or of its prompt."""
        messages = sample.messages
        segments = [] if messages and messages[0]["role"] == "system" else [self._default_system]
        if prompt and messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        taught: list[tuple[int, int]] = []  # [first, end) segments of an answer
        places = iter(grids)
        for number, message in enumerate(messages):
            answer = message["role"] == "assistant"
            earlier = answer and (prompt or number < len(messages) - 1)
            content, whole = self._content(message, earlier, places, sample.key, shard)
            segments += [self._header(message["role"]), *content]
            # A turn whose thinking was dropped is context, not an example of how to answer.
            if answer and whole and not prompt:
                taught.append((len(segments) - len(content), len(segments)))
        if prompt:
            segments.append(self._header("assistant"))
        elif not taught:
            raise SampleError("empty_answer", sample.key, shard, "the chat has no assistant turn to learn from")
        ids = np.concatenate(segments)
        labels = np.full(len(ids), IGNORE)
        starts = [0, *accumulate(map(len, segments))]
        for first, end in taught:
            answer_ids = slice(starts[first], starts[end])
            labels[answer_ids] = ids[answer_ids]
        return ids, labels

    def _content(
        self, message: dict[str, Any], earlier: bool, grids: Iterator[Grid], key: str, shard: str | None
    ) -> tuple[list[np.ndarray], bool]:
        """Token ids of one turn's content with its closing mark, and whether all of its text is in them."""
        segments, whole = [], True
        for part in message["content"]:
            if part["type"] == "image":
                height, width = next(grids)
                segments += [self._image_start, np.full(height * width // 4, self._image_pad), self._image_end]
                continue
            text = part["text"]
            if found := self._special_in(text):
                raise SampleError(
                    "special_token", key, shard, f"the text contains the special token {found!r}; remove it"
                )
            if earlier and THINK_OPEN in text:
                text, whole = _THINKING.sub("", text), False
            segments.append(self._text(text))
        return [*segments, self._turn_end], whole

    def _header(self, role: str) -> np.ndarray:
        if role not in self._headers:
            self._headers[role] = self._spell(f"<|im_{role}|>", role, "<|im_middle|>")
        return self._headers[role]

    def _text(self, text: str) -> np.ndarray:
        if not text:
            return np.zeros(0, np.int64)
        if self._encode_text is not None:
            return self._encode_text(text)
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), np.int64)

    def _spell(self, *pieces: str) -> np.ndarray:
        """The ids of pieces that are each a special token or ordinary text."""
        special = self._special_ids
        spelled = [np.array([special[piece]]) if piece in special else self._text(piece) for piece in pieces]
        return np.concatenate(spelled)

    def _special_in(self, text: str) -> str | None:
        """The first special token in a text. Nearly no text has even the beginning of one, which is cheap to see."""
        for opening in self._special_openings:
            if opening[0] in text and opening in text:  # one character is found 10 times as fast as two
                found = self._special_text.search(text)
                return found and found.group()
        return None

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return dict(self.tokenizer.get_added_vocab())

    @cached_property
    def _special_openings(self) -> list[str]:
        """What each special token begins with: the longer, the faster it is searched for."""
        alike = groupby(sorted(self._special_ids), key=lambda token: token[:2])
        return [commonprefix(list(tokens)) for _, tokens in alike]

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self._special_ids))

    @cached_property
    def _default_system(self) -> np.ndarray:
        """The turn that is put before a chat which does not begin with a system turn."""
        return np.concatenate([self._header("system"), self._text(DEFAULT_SYSTEM), self._turn_end])

    @cached_property
    def _turn_end(self) -> np.ndarray:
        return self._spell("<|im_end|>")

    @cached_property
    def _image_start(self) -> np.ndarray:
        return self._spell("<|media_start|>", "image", "<|media_content|>")

    @cached_property
    def _image_end(self) -> np.ndarray:
        return self._spell("<|media_end|>")

    @cached_property
    def _image_pad(self) -> int:
        return self._special_ids["<|media_pad|>"]


def _patches(grids: Sequence[Grid]) -> int:
    return sum(height * width for height, width in grids)
