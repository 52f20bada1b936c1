"""Images and text to model inputs, at an image's native resolution.

Arithmetic of one image (technical report section 2.1, and the official image processor): scale down when it has more
patches than `in_token_limit`, pad right and bottom with black to multiples of 28, cut into 14 x 14 patches. A 2 x 2
square of patches becomes one token of the language model.

    1920 x 1080, limit 4096: 137 * 77 = 10549 patches -> scaled by 0.623 to 1196 x 672 -> padded to 1204 x 672
                             -> grid (h, w) = (48, 86) -> 1032 tokens

This file travels with every model folder, as `processing_kimi_vl.py`: vLLM knows the model, but no processor of it, and
loads the folder's own (`trust_remote_code`). So it imports nothing of kimivl.

Legend: P patches, h w grid of an image in patches.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

IMAGE_TOKEN = "<|media_pad|>"
MAX_SIDE = 512  # patches; the 2-D RoPE of the reference has a table of this size

CODE = "processing_kimi_vl.py"
"""The name of this file in a model folder."""
_AUTO_MAP = {"AutoImageProcessor": "KimiVLImageProcessor", "AutoProcessor": "KimiVLProcessor"}

Resize = Literal["torch", "pil"]


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def _auto_map() -> dict[str, str]:
    """Where transformers finds the classes when a folder is loaded without kimivl."""
    return {auto: f"{CODE.removesuffix('.py')}.{name}" for auto, name in _AUTO_MAP.items()}


class KimiVLImageProcessor(BaseImageProcessor):
    """Images to patches and grids. No torchvision.

    `resize` chooses who scales down, both bicubic with antialiasing: "torch" is about 4 times as fast, and on
    photographs at most 2/255 away from "pil", which has the official processor's pixels.
    """

    model_input_names = ["pixel_values", "image_grid_hws"]

    def __init__(
        self,
        patch_size: int = 14,
        merge_kernel_size: tuple[int, int] | list[int] = (2, 2),
        in_token_limit: int = 4096,
        pad_input: bool = True,
        image_mean: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5),
        resize: Resize = "torch",
        **kwargs: Any,
    ) -> None:
        kwargs.pop("auto_map", None)  # `to_dict` writes its own: the hub's code is not needed, and does not travel
        super().__init__(**kwargs)
        if set(image_mean) | set(image_std) != {0.5} or not pad_input:
            raise ValueError("Kimi-VL's image processor has mean = std = 0.5 and pad_input = true")
        if resize not in get_args(Resize):
            raise ValueError(f"the image processor's resize must be one of {get_args(Resize)}, got {resize!r}")
        self.patch_size = patch_size
        self.merge_kernel_size = list(merge_kernel_size)
        self.in_token_limit = in_token_limit
        self.pad_input = pad_input
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize = resize

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"auto_map": _auto_map()}

    def settings(self) -> dict[str, Any]:
        """What decides an image's grid and patches."""
        names = ("patch_size", "merge_kernel_size", "in_token_limit", "resize")
        return {name: getattr(self, name) for name in names}

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(h, w) in patches, after scaling and padding, of an image of width x height pixels."""
        return self._grid(*self._scaled(width, height))

    def tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of the language model for a grid (h, w)."""
        return grid[0] * grid[1] // math.prod(self.merge_kernel_size)

    def patches(self, image: np.ndarray | Image.Image, out: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """(P, 3, 14, 14) uint8 patches in raster order, and the grid (h, w).

        Args:
            image: (H, W, 3) uint8 pixels, or a PIL image of any mode.
            out: (P, 3, 14, 14) uint8, where the patches are written; `grid` tells P.
        """
        pixels = self._scaled_pixels(image)
        height, width = pixels.shape[1:]
        h, w = self._grid(width, height)
        size = self.patch_size
        if out is None:
            out = torch.empty(h * w, 3, size, size, dtype=torch.uint8)
        padded = torch.zeros(3, h * size, w * size, dtype=torch.uint8)
        padded[:, :height, :width] = pixels
        # A row of a patch lies together in both, so it is copied as one item of 14 bytes: 3 times as fast as pixels.
        rows = padded.view(3, h, size, w, size).numpy().view(f"V{size}").squeeze(-1)
        out.view(h, w, 3, size, size).numpy().view(f"V{size}").squeeze(-1)[...] = rows.transpose(1, 3, 0, 2)
        return out, (h, w)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """`pixel_values` (P, 3, 14, 14) float32 normalised, and `image_grid_hws` (n_images, 2), of all images."""
        cut = [self.patches(image) for image in _flatten(images)]
        data = {
            "pixel_values": normalise(torch.cat([patches for patches, _ in cut])),
            "image_grid_hws": torch.tensor([grid for _, grid in cut], dtype=torch.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _scaled_pixels(self, image: np.ndarray | Image.Image) -> Tensor:
        """(3, H, W) uint8 within the patch budget, a view of pixels that may lie in any order."""
        if self.resize == "pil":
            image = _as_pil(image)
            scaled = self._scaled(*image.size)
            if scaled != image.size:
                image = image.resize(scaled, resample=Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(_as_array(image)).permute(2, 0, 1)
        height, width = pixels.shape[1:]
        scaled = self._scaled(width, height)
        if self.resize == "pil" or scaled == (width, height):
            return pixels
        size = (scaled[1], scaled[0])
        # torch has a fast path for uint8 pixels that lie channels last, as these do.
        return F.interpolate(pixels.unsqueeze(0), size=size, mode="bicubic", antialias=True).squeeze(0)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Size in pixels within the patch budget; images are never scaled up."""
        patches = (width // self.patch_size) * (height // self.patch_size)
        if patches <= self.in_token_limit:
            return width, height
        scale = math.sqrt(self.in_token_limit / patches)
        return int(width * scale), int(height * scale)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Patches of a size in pixels, padded to whole tokens. The budget is soft: padding comes after scaling."""
        merge_h, merge_w = self.merge_kernel_size
        h = math.ceil(height / (self.patch_size * merge_h)) * merge_h
        w = math.ceil(width / (self.patch_size * merge_w)) * merge_w
        if not (0 < h < MAX_SIDE and 0 < w < MAX_SIDE):
            raise ValueError(
                f"an image of {width}x{height} pixels has {w}x{h} patches; each side must be under {MAX_SIDE} "
                f"({MAX_SIDE * self.patch_size} pixels): crop it or drop the sample"
            )
        return h, w


class KimiVLProcessor(ProcessorMixin):
    """Image processor and tokenizer together; each `<|media_pad|>` becomes h*w/4 of them."""

    def __init__(
        self,
        image_processor: KimiVLImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> list[str]:
        """Write transformers' own files, the official `preprocessor_config.json`, and the code that reads them."""
        files = super().save_pretrained(save_directory, **kwargs)
        code = Path(save_directory) / CODE
        if not (code.exists() and code.samefile(__file__)):
            shutil.copyfile(__file__, code)
        return [*(files or []), *self.image_processor.save_pretrained(save_directory), str(code)]

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().to_dict(*args, **kwargs) | {"auto_map": _auto_map()}

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        return_tensors: str | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """Inputs of the model for one text or several, and all their images in order.

        Text is tokenized first and the image token's id repeated afterwards. Raises ValueError, naming the text,
        when placeholders and images differ in number.
        """
        if videos is not None or audio is not None:
            raise ValueError("Kimi-VL reads text and images: give the frames of a video as images")
        data: dict[str, Any] = dict(self.image_processor(images)) if _flatten(images) else {}
        if text is not None:
            rows = self.tokenizer([text] if isinstance(text, str) else list(text), add_special_tokens=False)
            grids = [tuple(grid) for grid in data["image_grid_hws"].tolist()] if data else []
            ids = {"input_ids": self._expand(rows["input_ids"], grids)}
            data |= self.tokenizer.pad(ids, padding=padding, padding_side=padding_side, return_tensors=return_tensors)
        return BatchFeature(data, tensor_type=return_tensors)

    def _expand(self, rows: list[list[int]], grids: list[tuple[int, int]]) -> list[list[int]]:
        found = [row.count(self.image_token_id) for row in rows]
        if sum(found) != len(grids):
            raise ValueError(f"{len(grids)} images for {sum(found)} {IMAGE_TOKEN} (per text: {found})")
        remaining = iter(grids)
        return [
            [
                token
                for token_id in row
                for token in [token_id]
                * (self.image_processor.tokens(next(remaining)) if token_id == self.image_token_id else 1)
            ]
            for row in rows
        ]


def _flatten(images: Any) -> list[Any]:
    """The images of any nesting of lists, in order."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for item in images for image in _flatten(item)]


def _as_pil(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(_as_array(image))


def _as_array(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 pixels that torch may share."""
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"an image must be a PIL image or a uint8 array (height, width, 3), got {array.dtype} {array.shape}"
        )
    return array if array.flags.writeable and min(array.strides) > 0 else array.copy()
