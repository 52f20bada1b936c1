"""What each published shape becomes, and what is refused."""

import base64
from typing import Any

import pytest

from kimivl.data.build.shapes import Refusal, draft

CAT = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}


def user(*parts: str | None) -> dict[str, Any]:
    """A user turn; None stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def human(*values: str) -> list[dict[str, str]]:
    """Turns of from / value, human and gpt in turn."""
    return [{"from": "human" if place % 2 == 0 else "gpt", "value": value} for place, value in enumerate(values)]


@pytest.mark.parametrize(
    ("row", "messages", "images"),
    [
        pytest.param(
            {"id": "7", "image": "a.jpg", "conversations": human("<image>\nWhat?", "A cat.")},
            [user(None, "What?"), CAT],
            ["a.jpg"],
            id="llava",
        ),
        pytest.param(
            {"image": ["a.jpg", "b.jpg"], "conversations": human("First\n<image>\nthen<image>.", "A cat.")},
            [user("First", None, "then", None, "."), CAT],
            ["a.jpg", "b.jpg"],
            id="llava with marks between texts",
        ),
        pytest.param({"conversations": human("What?", "A cat.")}, [user("What?"), CAT], [], id="text alone"),
        pytest.param(
            {"images": ["a", "b"], "system": "Be brief.", "conversations": human("What?", "A cat.")},
            [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user(None, None, "What?"), CAT],
            ["a", "b"],
            id="sharegpt without marks",
        ),
        pytest.param(
            {
                "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
                "images": ["a"],
                "system": "",
            },
            [user(None, "What?"), CAT],
            ["a"],
            id="llama-factory",
        ),
        pytest.param(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What?", "image_url": None},
                            {"type": "image_url", "image_url": {"url": "file:///r/a%20b.jpg"}},
                            {"type": "image"},
                            {"type": "image", "image": {"bytes": b"c", "path": "c.jpg"}},
                        ],
                    },
                    CAT,
                ],
                "images": ["b.jpg"],
            },
            [user("What?", None, None, None), CAT],
            ["/r/a b.jpg", "b.jpg", b"c"],
            id="openai parts",
        ),
        pytest.param(
            {"question": "How many?", "answer": "4", "image": {"bytes": None, "path": "a.png"}},
            [user(None, "How many?")],
            ["a.png"],
            id="problem",
        ),
        pytest.param(
            {"prompt": [{"role": "user", "content": "<image>How many?"}], "answer": "4", "images": [b"png"]},
            [user(None, "How many?")],
            [b"png"],
            id="problem as turns",
        ),
    ],
)
def test_shapes(row: dict[str, Any], messages: list[dict[str, Any]], images: list[Any]) -> None:
    chat = draft(row)
    assert chat.fields["messages"] == messages
    assert chat.images == images


def test_data_url_is_decoded() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    assert draft({"problem": "?", "answer": "1", "images": [url]}).images == [b"pixels"]


def test_fields_are_kept_and_the_source_has_a_default() -> None:
    row = {"messages": [user("?")], "answer": 4, "difficulty": 2, "task": "count", "source": None, "id": 9}
    fields = draft(row, source="dots").fields
    assert {**fields, "messages": None} == {
        "messages": None,
        "answer": "4",
        "difficulty": 2,
        "task": "count",
        "source": "dots",
    }
    assert draft({**row, "source": "own"}, source="dots").fields["source"] == "own"


def test_gaps_of_tables_are_no_fields() -> None:
    row = {"problem": "?", "answer": "1", "difficulty": 2.0, "task": float("nan"), "images": None}
    assert draft(row).fields | {"messages": 0} == {"messages": 0, "answer": "1", "difficulty": 2}


@pytest.mark.parametrize(
    ("reason", "told", "row"),
    [
        ("unknown_shape", "'caption'", {"caption": "A cat.", "image": "a.jpg"}),
        ("unknown_shape", "no 'answer'", {"question": "What?"}),
        ("bad_json", "tool", {"messages": [{"role": "tool", "content": "?"}]}),
        ("bad_json", "got .*3", {"messages": [{"role": "user", "content": 3}]}),
        ("bad_json", "audio", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
        ("bad_json", "no user turn", {"images": ["a"], "conversations": [{"from": "gpt", "value": "A cat."}]}),
        ("image_count", "more image marks", {"conversations": human("<image><image>What?"), "images": ["a"]}),
        ("image_count", "1 marks for 2 images", {"conversations": human("<image>What?"), "images": ["a", "b"]}),
        ("image_count", "more image marks", {"conversations": human("<image>What?")}),
        ("missing_member", "None", {"conversations": human("What?"), "images": [None]}),
        ("remote_image", "download", {"conversations": human("What?"), "images": ["https://host/a.jpg"]}),
        ("bad_image", "base64", {"conversations": human("What?"), "images": ["data:image/png;base64,%%"]}),
        ("bad_image", "base64", {"conversations": human("What?"), "images": ["data:image/svg+xml,<svg/>"]}),
    ],
)
def test_refusals(reason: str, told: str, row: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match=told) as caught:
        draft(row)
    assert caught.value.reason == reason
