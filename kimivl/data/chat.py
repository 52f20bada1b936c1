"""Chats to token ids with a loss mask, in Kimi-VL's chat format (no newlines, no BOS).

A turn is ``<|im_ROLE|>ROLE<|im_middle|>CONTENT<|im_end|>``. Special tokens bound every piece of text, so the text
is tokenised piece by piece and the mask is exact by construction: supervised are the tokens of an assistant's
content and its closing ``<|im_end|>``, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from kimivl.data.images import decode_image
from kimivl.data.pack import IGNORE, EncodedSample
from kimivl.data.sample import Sample, SampleError

DEFAULT_SYSTEM = "You are a helpful assistant"
THINK_OPEN, THINK_CLOSE = "◁think▷", "◁/think▷"
"""The marks of a thinking model: ordinary text, not special tokens."""

_THINKING = re.compile(f"{THINK_OPEN}.*?{THINK_CLOSE}", re.DOTALL)


class ImagePatcher(Protocol):
    """What the encoder needs of an image processor (``kimivl.model.KimiVLImageProcessor`` has it)."""

    def patches(self, image: Any) -> tuple[Tensor, tuple[int, int]]: ...


class SampleEncoder:
    """Turns a ``Sample`` into tensors. Picklable, so that loader workers can carry it.

    Args:
        tokenizer: a transformers tokenizer with Kimi-VL's special tokens.
        image_processor: cuts a picture into uint8 patches and says its grid.
    """

    def __init__(self, tokenizer: Any, image_processor: ImagePatcher) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._headers: dict[str, list[int]] = {}

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return dict(self.tokenizer.get_added_vocab())

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self._special_ids))

    @property
    def stop_id(self) -> int:
        """The token that ends a turn."""
        return self._special_ids["<|im_end|>"]

    def encode(self, sample: Sample, shard: str | None = None) -> EncodedSample:
        """The whole chat, supervised on the assistant's answers."""
        encoded = self._encode(sample, sample.messages, shard, generate=False)
        if encoded.num_targets == 0:
            raise SampleError("empty_answer", sample.key, shard, "the chat has no assistant turn to learn from")
        return encoded

    def encode_prompt(self, sample: Sample, shard: str | None = None) -> EncodedSample:
        """The chat up to the assistant's last turn, opened for it; nothing is supervised."""
        messages = sample.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self._encode(sample, messages, shard, generate=True)

    def _encode(self, sample: Sample, messages: list[dict], shard: str | None, generate: bool) -> EncodedSample:
        pictures = [self._patches(image, sample.key, shard) for image in sample.images]
        image_tokens = iter([height * width // 4 for _, (height, width) in pictures])
        ids: list[int] = []
        labels: list[int] = []
        if not messages or messages[0]["role"] != "system":
            system = {"role": "system", "content": [{"type": "text", "text": DEFAULT_SYSTEM}]}
            messages = [system, *messages]
        for number, message in enumerate(messages):
            earlier = message["role"] == "assistant" and (generate or number < len(messages) - 1)
            content, whole = self._content(message, earlier, image_tokens, sample.key, shard)
            # A turn whose thinking was dropped is context, not an example of how to answer.
            supervised = message["role"] == "assistant" and whole
            ids += self._header(message["role"]) + content
            labels += [IGNORE] * (len(ids) - len(labels) - len(content))
            labels += content if supervised else [IGNORE] * len(content)
        if generate:
            ids += self._header("assistant")
            labels = [IGNORE] * len(ids)
        return EncodedSample(
            input_ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            pixel_values=_concatenate([patches for patches, _ in pictures]),
            image_grid_hws=torch.tensor([grid for _, grid in pictures], dtype=torch.int64).reshape(-1, 2),
        )

    def _patches(self, image: bytes, key: str, shard: str | None) -> tuple[Tensor, tuple[int, int]]:
        picture = decode_image(image, key, shard)
        try:
            return self.image_processor.patches(picture)
        except ValueError as error:  # too many patches on a side
            raise SampleError("bad_image", key, shard, str(error)) from error

    def _content(
        self, message: dict, earlier: bool, image_tokens: Any, key: str, shard: str | None
    ) -> tuple[list[int], bool]:
        """Token ids of one turn's content with its closing mark, and whether all of its text is in them."""
        special, ids, whole = self._special_ids, [], True
        for part in message["content"]:
            if part["type"] == "image":
                ids += [special["<|media_start|>"], *self._text("image"), special["<|media_content|>"]]
                ids += [special["<|media_pad|>"]] * next(image_tokens)
                ids += [special["<|media_end|>"]]
                continue
            text = part["text"]
            if found := self._special_text.search(text):
                raise SampleError(
                    "special_token", key, shard, f"the text contains the special token {found.group()!r}; remove it"
                )
            if earlier and THINK_OPEN in text:
                text, whole = _THINKING.sub("", text), False
            ids += self._text(text)
        return [*ids, special["<|im_end|>"]], whole

    def _header(self, role: str) -> list[int]:
        if role not in self._headers:
            special = self._special_ids
            self._headers[role] = [special[f"<|im_{role}|>"], *self._text(role), special["<|im_middle|>"]]
        return self._headers[role]

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []


def _concatenate(patches: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(patches)) if patches else torch.zeros(0, 3, 14, 14, dtype=torch.uint8)
