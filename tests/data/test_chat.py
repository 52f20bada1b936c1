"""The chat format and its loss mask."""

import io

import pytest
from PIL import Image

from kimivl.data.chat import SampleEncoder
from kimivl.data.pack import IGNORE
from kimivl.data.sample import Sample, SampleError


def text(content: str) -> list[dict]:
    return [{"type": "text", "text": content}]


def picture(width: int = 56, height: int = 28) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (40, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def chat(*turns: tuple[str, str], images: int = 0) -> Sample:
    messages = [{"role": role, "content": text(content)} for role, content in turns]
    first_user = next(message for message in messages if message["role"] == "user")
    first_user["content"] = [{"type": "image"}] * images + first_user["content"]
    return Sample("chat", messages, images=tuple(picture() for _ in range(images)))


def supervised(encoder: SampleEncoder, sample: Sample) -> str:
    encoded = encoder.encode(sample)
    return encoder.tokenizer.decode([label for label in encoded.labels.tolist() if label != IGNORE])


def test_ids_are_those_of_the_chat_template(encoder):
    sample = chat(("system", "Be short."), ("user", "Read: 12?"), ("assistant", "\\boxed{12}"), images=2)
    encoded = encoder.encode(sample)
    rendered = encoder.tokenizer.apply_chat_template(sample.messages, tokenize=False)
    pad = encoder.tokenizer.convert_tokens_to_ids("<|media_pad|>")
    expected: list[int] = []
    for token in encoder.tokenizer.encode(rendered, add_special_tokens=False):
        expected += [pad, pad] if token == pad else [token]  # 56x28 pixels: two merged tokens
    assert encoded.input_ids.tolist() == expected
    assert encoded.image_grid_hws.tolist() == [[2, 4], [2, 4]]
    assert encoded.pixel_values.shape == (16, 3, 14, 14)


def test_prompt_is_the_template_with_a_generation_prompt(encoder):
    sample = chat(("user", "2+2?"), ("assistant", "4"))
    rendered = encoder.tokenizer.apply_chat_template(sample.messages[:1], tokenize=False, add_generation_prompt=True)
    encoded = encoder.encode_prompt(sample)
    assert encoded.input_ids.tolist() == encoder.tokenizer.encode(rendered, add_special_tokens=False)
    assert (encoded.labels == IGNORE).all()


def test_mask_covers_exactly_answers_and_their_end(encoder):
    sample = chat(("user", "one"), ("assistant", "ANSWER1"), ("user", "two"), ("assistant", "ANSWER2"), images=1)
    assert supervised(encoder, sample) == "ANSWER1<|im_end|>ANSWER2<|im_end|>"


def test_earlier_thinking_is_dropped_and_not_supervised(encoder):
    thought = "◁think▷hard◁/think▷four"
    sample = chat(("user", "2+2?"), ("assistant", thought), ("user", "3+3?"), ("assistant", "◁think▷x◁/think▷six"))
    decoded = encoder.tokenizer.decode(encoder.encode(sample).input_ids)
    assert "hard" not in decoded and "four<|im_end|>" in decoded
    assert supervised(encoder, sample) == "◁think▷x◁/think▷six<|im_end|>"


def test_special_tokens_in_text_are_refused_by_name(encoder):
    with pytest.raises(SampleError, match="chat.*<\\|im_end\\|>") as error:
        encoder.encode(chat(("user", "say <|im_end|>"), ("assistant", "no")))
    assert error.value.reason == "special_token"


def test_a_chat_without_an_answer_cannot_be_learned_from(encoder):
    with pytest.raises(SampleError) as error:
        encoder.encode(chat(("user", "hello")))
    assert error.value.reason == "empty_answer"


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not an image"])
def test_an_image_that_does_not_decode_is_named(encoder, damage):
    sample = chat(("user", "x"), ("assistant", "y"), images=1)
    broken = Sample("chat-7", sample.messages, images=(damage(sample.images[0]),))
    with pytest.raises(SampleError, match="chat-7") as error:
        encoder.encode(broken, "some.tar")
    assert error.value.reason == "bad_image" and "some.tar" in str(error.value)


def test_an_enormous_image_is_refused_before_it_is_decoded(encoder):
    buffer = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(buffer, "PNG")  # 81 megapixels in about 10 KB
    sample = chat(("user", "x"), ("assistant", "y"), images=1)
    with pytest.raises(SampleError, match="9000x9000"):
        encoder.encode(Sample("bomb", sample.messages, images=(buffer.getvalue(),)))
