"""A sample is parsed into one normal form, or refused with a reason, its key and its shard."""

import io
import json
import pickle

import pytest
from PIL import Image

from kimivl.data.sample import Sample, SampleError, parse_sample


def picture(form: str) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(stream, form)
    return stream.getvalue()


PNG, JPEG = picture("png"), picture("jpeg")
ASK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read it."}]}
TELL = {"role": "assistant", "content": "37"}


def members(messages: object = (ASK, TELL), *, images: dict[str, bytes] | None = None, **fields: object) -> dict:
    text = json.dumps({"messages": messages, **fields}).encode()
    return {"json": text, **({"0.png": PNG} if images is None else images)}


def test_contents_are_normalised_and_fields_read():
    sample = parse_sample("a", members(answer="37", difficulty=2, source="digits", task="read"), "s.tar")
    assert sample == Sample(
        key="a",
        messages=[ASK, {"role": "assistant", "content": [{"type": "text", "text": "37"}]}],
        images=(PNG,),
        answer="37",
        difficulty=2,
        source="digits",
        task="read",
    )


def test_a_problem_needs_no_assistant_turn_and_no_labels():
    sample = parse_sample("a", members([ASK]), None)
    assert (sample.answer, sample.difficulty, sample.source) == (None, None, "")


def test_images_are_ordered_by_number_not_by_name():
    two = [{"role": "user", "content": [{"type": "image"}] * 11}]
    images = {f"{i}.png": PNG for i in range(9, -1, -1)} | {"10.jpg": JPEG}
    parsed = parse_sample("a", members(two, images=images))
    assert parsed.images == (PNG,) * 10 + (JPEG,)


FAULTS = {
    "no json": ({"0.png": PNG}, "missing_member"),
    "not json": ({"json": b"{", "0.png": PNG}, "bad_json"),
    "not utf-8": ({"json": b"\xff\xfe\x00"}, "bad_json"),
    "a list": ({"json": b"[]"}, "bad_json"),
    "no messages": (members([]), "bad_json"),
    "brackets without end": ({"json": b'{"messages":' + b"[" * 100_000}, "bad_json"),
    "a number without end": ({"json": b'{"messages":' + b"9" * 100_000 + b"}"}, "bad_json"),
    "half a character in the text": (members([{"role": "user", "content": "\ud83d"}], images={}), "bad_json"),
    "half a character in the answer": (members(answer="\udc00"), "bad_json"),
    "half a character in the source": (members(source="a\ud800"), "bad_json"),
    "a strange role": (members([{"role": "tool", "content": "x"}], images={}), "bad_json"),
    "a strange part": (members([{"role": "user", "content": [{"type": "video"}]}], images={}), "bad_json"),
    "text that is a number": (members([{"role": "user", "content": [{"type": "text", "text": 3}]}]), "bad_json"),
    "no user turn": (members([TELL], images={}), "bad_json"),
    "a difficulty of words": (members(difficulty="hard"), "bad_json"),
    "a difficulty that is true": (members(difficulty=True), "bad_json"),
    "a source that is a list": (members(source=["x"]), "bad_json"),
    "an answer turn without text": (members([ASK, {"role": "assistant", "content": " \n"}]), "empty_answer"),
    "an empty answer": (members(answer=""), "empty_answer"),
    "an answer that is a number": (members(answer=37), "empty_answer"),
    "fewer images than parts": (members(images={}), "image_count"),
    "more images than parts": (members(images={"0.png": PNG, "1.png": PNG}), "image_count"),
    "two images of one number": (members(images={"0.png": PNG, "0.jpg": JPEG}), "image_count"),
    "a gap in the images": (members(images={"1.png": PNG}), "missing_member"),
    "no picture": (members(images={"0.png": b"hello"}), "bad_image"),
    "an empty picture": (members(images={"0.png": b""}), "bad_image"),
    "a flipped byte": (members(images={"0.png": PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:]}), "bad_image"),
    "half a PNG": (members(images={"0.png": PNG[: len(PNG) // 2]}), "bad_image"),
    "half a JPEG": (members(images={"0.jpg": JPEG[: len(JPEG) // 2]}), "bad_image"),
}


@pytest.mark.parametrize(("parts", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_have_a_reason_and_name_sample_and_shard(parts: dict[str, bytes], reason: str):
    with pytest.raises(SampleError) as caught:
        parse_sample("cat-7", parts, "rl-000003.tar")
    error = caught.value
    assert (error.reason, error.key, error.shard) == (reason, "cat-7", "rl-000003.tar")
    assert "cat-7" in str(error) and "rl-000003.tar" in str(error)


def test_images_that_were_checked_before_are_not_looked_at_again():
    half = PNG[: len(PNG) // 2]
    assert parse_sample("a", members(images={"0.png": half}), check_images=False).images == (half,)
    with pytest.raises(SampleError, match="image_count"):
        parse_sample("a", members(images={}), check_images=False)


def test_members_that_are_no_numbered_images_are_left_alone():
    images = {"0.PNG": PNG, "thumb.png": PNG, "1.txt": b"", "²5.png": PNG, "9" * 5000 + ".png": PNG}
    assert parse_sample("a", members(images=images)).images == (PNG,)


def test_what_is_said_of_a_fault_stays_short():
    with pytest.raises(SampleError) as caught:
        parse_sample("a", members(answer=["x" * 10**6]))
    assert len(str(caught.value)) < 500


def test_a_fault_crosses_process_borders_whole():
    error = SampleError("bad_json", "a", "s.tar", "broken")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.key, again.shard) == (str(error), "bad_json", "a", "s.tar")
