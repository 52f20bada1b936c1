from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoProcessor

from kimivl.model import KimiVLImageProcessor, KimiVLProcessor
from kimivl.model.processor import normalise
from kimivl.model.tokenizer import train_tokenizer


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def processor() -> KimiVLProcessor:
    return KimiVLProcessor(KimiVLImageProcessor(), train_tokenizer(["one two three 123"] * 4, vocab_size=300))


@pytest.mark.parametrize(
    ("width", "height", "limit", "grid", "tokens"),
    [
        (896, 896, 4096, (64, 64), 1024),
        (1920, 1080, 4096, (48, 86), 1032),
        (1920, 1080, 16384, (78, 138), 2691),
        (3840, 2160, 16384, (98, 172), 4214),
        (112, 28, 4096, (2, 8), 4),
        (1, 1, 4096, (2, 2), 1),
        (29, 28, 4096, (2, 4), 2),
        (896, 896, 16384, (64, 64), 1024),
    ],
)
def test_published_check_values(width, height, limit, grid, tokens):
    images = KimiVLImageProcessor(in_token_limit=limit)
    assert images.grid(width, height) == grid
    assert images.tokens(grid) == tokens


def plain_grid(width: int, height: int, limit: int) -> tuple[int, int]:
    """The arithmetic of the facts, in whole numbers where they can be: (h, w) in patches."""
    patches = (width // 14) * (height // 14)
    if patches > limit:
        scale = (limit / patches) ** 0.5
        width, height = int(width * scale), int(height * scale)
    return 2 * -(-height // 28), 2 * -(-width // 28)


@settings(max_examples=300)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([16, 256, 4096, 16384]))
def test_the_grid_is_that_of_the_plain_arithmetic(width, height, limit):
    images = KimiVLImageProcessor(in_token_limit=limit)
    h, w = plain_grid(width, height, limit)
    if not (0 < h < 512 and 0 < w < 512):
        with pytest.raises(ValueError, match="crop it or drop the sample"):
            images.grid(width, height)
        return
    assert images.grid(width, height) == (h, w)
    assert h % 2 == w % 2 == 0 and images.tokens((h, w)) * 4 == h * w
    if (width // 14) * (height // 14) <= limit:  # never scaled up, nor down without need
        assert (h * 14 - height) in range(28) and (w * 14 - width) in range(28)
    else:  # soft by the padding, and by the part of a patch that the count of patches leaves out
        whole = (width // 14) * 14 * (height // 14) * 14
        assert (h - 2) * (w - 2) <= limit * width * height / whole


@settings(max_examples=40)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([16, 64, 256]))
def test_the_patches_have_the_promised_grid_whoever_resizes(width, height, limit):
    pixels = np.full((height, width, 3), 200, np.uint8)
    for resize in ("torch", "pil"):
        images = KimiVLImageProcessor(in_token_limit=limit, resize=resize)
        try:
            promised = images.grid(width, height)
        except ValueError:
            with pytest.raises(ValueError):
                images.patches(pixels)
            continue
        patches, grid = images.patches(pixels)
        assert grid == promised == plain_grid(width, height, limit)
        assert patches.shape == (grid[0] * grid[1], 3, 14, 14) and patches.dtype == torch.uint8


def test_a_small_image_is_padded_not_scaled():
    image = picture(30, 20)
    patches, grid = KimiVLImageProcessor().patches(image)
    assert grid == (2, 4)
    canvas = np.zeros((28, 56, 3), dtype=np.uint8)
    canvas[:20, :30] = np.asarray(image)
    for index, patch in enumerate(patches):
        row, column = divmod(index, 4)
        expected = canvas[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].transpose(2, 0, 1)
        assert np.array_equal(patch.numpy(), expected)
    assert normalise(patches)[-1].eq(-1).all()  # padding is -1 after normalisation


def test_uint8_path_equals_float_path(tiny):
    images = KimiVLImageProcessor()
    patches, grid = images.patches(picture(112, 56))
    batch = images(picture(112, 56), return_tensors="pt")
    reference = (patches.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(batch["pixel_values"], reference, atol=1e-6, rtol=0)
    grids = torch.tensor([grid])
    with torch.no_grad():
        assert torch.equal(tiny.image_features(patches, grids), tiny.image_features(batch["pixel_values"], grids))


def test_other_modes_are_converted():
    for mode in ("L", "RGBA", "P", "1"):
        patches, grid = KimiVLImageProcessor().patches(picture(40, 40, mode))
        assert grid == (4, 4) and patches.shape == (16, 3, 14, 14)


@pytest.mark.parametrize("size", [(1280, 853), (2000, 1300), (700, 3000)])
def test_resize_by_torch_is_close_to_that_by_pil(size):
    for photograph in load_sample_images().images:
        image = Image.fromarray(photograph).resize(size)
        ours, grid = KimiVLImageProcessor().patches(np.array(image))
        reference, same_grid = KimiVLImageProcessor(resize="pil").patches(image)
        assert grid == same_grid
        assert (ours.int() - reference.int()).abs().max() <= 2


def plain_pixels(image: Image.Image, limit: int) -> np.ndarray:
    """The official pipeline, step by step in Pillow and numpy: (P, 3, 14, 14) float32 normalised patches."""
    width, height = image.size
    patches = (width // 14) * (height // 14)
    if patches > limit:
        scale = (limit / patches) ** 0.5
        image = image.resize((int(width * scale), int(height * scale)), resample=Image.Resampling.BICUBIC)
    scaled = np.asarray(image.convert("RGB"))
    h, w = (2 * -(-side // 28) for side in scaled.shape[:2])
    canvas = np.zeros((14 * h, 14 * w, 3), np.float32)
    canvas[: scaled.shape[0], : scaled.shape[1]] = scaled.astype(np.float32) / np.float32(255)
    canvas = (canvas - np.float32(0.5)) / np.float32(0.5)
    return canvas.reshape(h, 14, w, 14, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 14, 14)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(600, 451), (97, 1203), (29, 57), (448, 448)])
def test_resize_pil_is_the_plain_pipeline_bit_for_bit(size, mode):
    image = picture(*size, mode=mode)
    images = KimiVLImageProcessor(in_token_limit=256, resize="pil")
    patches, _ = images.patches(image)
    assert np.array_equal(normalise(patches).numpy(), plain_pixels(image, 256))
    assert np.array_equal(images(image, return_tensors="pt")["pixel_values"].numpy(), plain_pixels(image, 256))


@pytest.mark.parametrize("resize", ["torch", "pil"])
@pytest.mark.parametrize("size", [(1, 1), (28, 28), (29, 57), (300, 200), (640, 427)])
def test_arrays_and_pil_images_give_the_same_patches(resize, size):
    images = KimiVLImageProcessor(in_token_limit=256, resize=resize)
    image = picture(*size)
    pixels = np.array(image)
    for other in (pixels, np.asarray(image), pixels[::-1].copy()[::-1]):  # plain, read-only, stored upside down
        assert torch.equal(images.patches(other)[0], images.patches(image)[0])


def test_patches_are_written_where_they_are_wanted():
    images = KimiVLImageProcessor(in_token_limit=64)
    buffer = torch.full((200, 3, 14, 14), 7, dtype=torch.uint8)
    expected, (h, w) = images.patches(picture(300, 200))
    patches, _ = images.patches(picture(300, 200), buffer[5 : 5 + h * w])
    assert patches.data_ptr() == buffer[5].data_ptr()
    assert torch.equal(buffer[5 : 5 + h * w], expected)
    assert (buffer[:5] == 7).all() and (buffer[5 + h * w :] == 7).all()


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_arrays_of_other_kinds_are_refused(array):
    with pytest.raises(ValueError, match=r"uint8 array \(height, width, 3\), got"):
        KimiVLImageProcessor().patches(array)


def test_an_unknown_resize_is_refused():
    with pytest.raises(ValueError, match="'torch', 'pil'"):
        KimiVLImageProcessor(resize="nearest")


def test_resize_is_part_of_the_settings_and_of_the_saved_config(tmp_path):
    for resize in ("torch", "pil"):
        images = KimiVLImageProcessor(resize=resize, in_token_limit=64)
        images.save_pretrained(tmp_path)
        loaded = KimiVLImageProcessor.from_pretrained(tmp_path)
        assert loaded.settings() == images.settings()
        assert loaded.settings()["resize"] == resize


def test_512_patches_on_a_side_is_an_error():
    images = KimiVLImageProcessor()
    assert images.grid(510 * 14, 14) == (2, 510)
    with pytest.raises(ValueError, match="7154x14 pixels has 512x2 patches; each side must be under 512 .* crop it"):
        images.grid(511 * 14, 14)
    with pytest.raises(ValueError, match="under 512"):
        images.patches(np.zeros((511 * 14, 14, 3), np.uint8))
    with pytest.raises(ValueError, match="40000x1 pixels"):  # at most as long as that: it is no more than one patch
        images.patches(np.zeros((1, 40_000, 3), np.uint8))


def test_other_normalisation_is_refused():
    with pytest.raises(ValueError, match="mean = std = 0.5"):
        KimiVLImageProcessor(image_mean=[0.48, 0.45, 0.4])


def test_placeholders_become_tokens(processor):
    media = processor.image_token_id
    pictures = [picture(56, 28), picture(28, 28), picture(60, 60)]
    text = ["one <|media_pad|> two <|media_pad|>", "three", "<|media_pad|>"]
    batch = processor(images=pictures, text=text, padding=True, return_tensors="pt")
    assert batch["image_grid_hws"].tolist() == [[2, 4], [2, 2], [6, 6]]
    assert (batch["input_ids"] == media).sum(1).tolist() == [3, 0, 9]
    assert batch["pixel_values"].shape == (8 + 4 + 36, 3, 14, 14)
    assert batch["attention_mask"].sum(1).tolist()[1] == len(processor.tokenizer("three")["input_ids"])


def test_placeholders_and_images_must_agree(processor):
    with pytest.raises(ValueError, match=r"1 images for 2 .* \(per text: \[2\]\)"):
        processor(images=[picture(28, 28)], text="<|media_pad|> and <|media_pad|>")
    with pytest.raises(ValueError, match="0 images for 1"):
        processor(text="<|media_pad|>")


def test_chat_with_an_image(processor):
    """transformers' own chat call: template, images and expansion in one."""
    content = [{"type": "image", "image": picture(56, 28)}, {"type": "text", "text": "one"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert batch["image_grid_hws"].tolist() == [[2, 4]]
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 2


def test_saved_is_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for loaded in (AutoProcessor.from_pretrained(tmp_path), KimiVLProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, KimiVLProcessor)
        assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
        assert loaded.chat_template == processor.chat_template
        inputs = {"images": [picture(56, 28)], "text": "one <|media_pad|>", "return_tensors": "pt"}
        for name, tensor in processor(**inputs).items():
            assert torch.equal(loaded(**inputs)[name], tensor)
