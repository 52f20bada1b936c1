"""The chat format and its loss mask."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kimivl.data import chat as chat_module
from kimivl.data.chat import Counts, SampleEncoder
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
    for act in (encoder.encode, encoder.measure):
        with pytest.raises(SampleError, match="9000x9000"):
            act(Sample("bomb", sample.messages, images=(buffer.getvalue(),)))


def counts_of(encoded) -> Counts:
    grids = encoded.image_grid_hws
    return Counts(len(encoded), len(encoded.pixel_values), encoded.num_targets, len(grids))


THOUGHT = "◁think▷7+7◁/think▷14"
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.just(THOUGHT))
IMAGE = st.tuples(st.integers(1, 120), st.integers(1, 120))
PART = st.one_of(TEXT, IMAGE)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Chats of any shape, which end in an answer."""
    messages, images = [], []
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=3))
    system = draw(st.booleans())
    for role in [*(["system"] if system else []), "user", *roles, "assistant"]:
        content = []
        for part in draw(st.lists(PART, min_size=1, max_size=3)):
            if isinstance(part, tuple):
                images.append(picture(*part))
                content.append({"type": "image"})
            else:
                content += text(part)
        messages.append({"role": role, "content": content})
    return Sample("any", messages, images=tuple(images))


@settings(max_examples=60)
@given(sample=samples())
def test_what_is_measured_is_what_is_encoded(encoder, sample):
    encoded = encoder.encode(sample)
    assert encoder.measure(sample) == counts_of(encoded)
    assert encoder.measure(sample, prompt=True) == counts_of(encoder.encode_prompt(sample))
    pad = encoder.tokenizer.convert_tokens_to_ids("<|media_pad|>")
    assert int((encoded.input_ids == pad).sum()) * 4 == len(encoded.pixel_values)
    assert encoded.input_ids.dtype == encoded.labels.dtype == torch.int64
    supervised = encoded.labels != IGNORE
    assert torch.equal(encoded.labels[supervised], encoded.input_ids[supervised])


def test_faults_of_the_text_are_found_when_measuring(encoder):
    for sample, reason in [
        (chat(("user", "say <|im_end|>"), ("assistant", "no")), "special_token"),
        (chat(("user", "hello")), "empty_answer"),
    ]:
        with pytest.raises(SampleError) as error:
            encoder.measure(sample, "some.tar")
        assert error.value.reason == reason and "some.tar" in str(error.value)


def test_text_that_only_resembles_special_tokens_is_ordinary(encoder):
    for content in ("a <| b", "[BOSS] [PADS", "<|im_end|", "[E"):
        sample = chat(("user", content), ("assistant", "ok"))
        assert content in encoder.tokenizer.decode(encoder.encode(sample).input_ids)
    for token in encoder.tokenizer.get_added_vocab():
        with pytest.raises(SampleError, match="special token"):
            encoder.encode(chat(("user", f"x{token}"), ("assistant", "ok")))


def test_patches_are_written_where_they_are_wanted(encoder):
    sample = chat(("user", "x"), ("assistant", "y"), images=2)
    expected = encoder.encode(sample)
    buffer = torch.full((30, 3, 14, 14), 7, dtype=torch.uint8)
    encoded = encoder.encode(sample, out=buffer[4:20])
    assert encoded.pixel_values.data_ptr() == buffer[4].data_ptr()
    assert torch.equal(buffer[4:20], expected.pixel_values)
    assert (buffer[:4] == 7).all() and (buffer[20:] == 7).all()
    with pytest.raises(SampleError, match="16 patches, but there is room for 15") as error:
        encoder.encode(sample, "some.tar", out=buffer[:15])
    assert error.value.reason == "bad_shard"


def test_an_image_of_another_size_than_its_header_says_is_refused(encoder, monkeypatch):
    monkeypatch.setattr(chat_module, "image_size", lambda *_: (28, 28))
    with pytest.raises(SampleError, match=r"chat.*\(2, 4\) patches, but its header promised \(2, 2\)") as error:
        encoder.encode(chat(("user", "x"), ("assistant", "y"), images=1))
    assert error.value.reason == "bad_image"


def test_an_image_with_too_long_a_side_is_named(encoder):
    sample = chat(("user", "x"), ("assistant", "y"), images=1)
    long = Sample("long", sample.messages, images=(picture(7168, 14),))
    for act in (encoder.encode, encoder.measure):
        with pytest.raises(SampleError, match="long.*under 512") as error:
            act(long)
        assert error.value.reason == "bad_image"


class Letters:
    """Text to the ids of its letters."""

    def __call__(self, text: str) -> np.ndarray:
        return np.array([ord(letter) for letter in text], np.int64)


def test_text_is_encoded_by_what_is_given(encoder):
    encode = SampleEncoder(encoder.tokenizer, encoder.image_processor, Letters()).encode
    answer = encode(chat(("user", "x"), ("assistant", "yes"))).input_ids[-4:].tolist()
    assert answer == [*map(ord, "yes"), encoder.stop_id]


def test_a_pickled_encoder_encodes_the_same(encoder):
    sample = chat(("user", "x"), ("assistant", "y"), images=1)
    for one in (encoder, SampleEncoder(encoder.tokenizer, encoder.image_processor, Letters())):
        again = pickle.loads(pickle.dumps(one))
        assert again.fingerprint() == one.fingerprint()
        assert torch.equal(again.encode(sample).input_ids, one.encode(sample).input_ids)


@pytest.mark.parametrize("change", [{"resize": "pil"}, {"in_token_limit": 64}])
def test_the_fingerprint_covers_the_image_settings(encoder, change):
    images = copy.copy(encoder.image_processor)
    for name, value in change.items():
        setattr(images, name, value)
    changed = SampleEncoder(encoder.tokenizer, images, encoder._encode_text)
    assert changed.fingerprint() != encoder.fingerprint()


def test_the_fingerprint_covers_tokenizer_and_format_and_nothing_else(encoder, monkeypatch):
    before = encoder.fingerprint()
    encoder.encode(chat(("user", "x"), ("assistant", "y"), images=1))
    images, encode_text = encoder.image_processor, encoder._encode_text
    assert SampleEncoder(copy.deepcopy(encoder.tokenizer), images, encode_text).fingerprint() == before
    assert SampleEncoder(encoder.tokenizer, images, Letters()).fingerprint() != before
    other = copy.deepcopy(encoder.tokenizer)
    other.add_tokens(["another"])
    assert SampleEncoder(other, images, encode_text).fingerprint() != before
    monkeypatch.setattr(chat_module, "FORMAT", chat_module.FORMAT + 1)
    assert encoder.fingerprint() != before
