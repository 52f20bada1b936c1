"""Remote files: what is said where fsspec has no filesystem, and which errors are worth another try."""

import pytest

from kimivl.data import remote
from kimivl.data.remote import Remote, as_os_error, cause_of, is_transient
from kimivl.data.storage import Storage


class WebError(Exception):
    """As the HTTP libraries raise it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"answered {status}")
        self.status = status


def test_a_protocol_that_is_not_installed_is_said_with_its_package(monkeypatch: pytest.MonkeyPatch):
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3://bucket/a\.tar .*pip install s3fs"):
        Storage().read("s3://bucket/a.tar", 0, 10)


def test_an_unknown_protocol_is_said():
    with pytest.raises(ValueError, match="htp://x/a.tar"):
        Storage().read("htp://x/a.tar", 0, 10)


@pytest.mark.parametrize(
    ("error", "transient", "kind"),
    [
        (WebError(500), True, OSError),
        (WebError(429), True, OSError),
        (WebError(400), False, OSError),
        (WebError(404), False, FileNotFoundError),
        (WebError(403), False, PermissionError),
        (TimeoutError(), True, OSError),
        (ConnectionResetError(), True, OSError),
        (EOFError(), True, OSError),
        (FileNotFoundError(), False, FileNotFoundError),
        (PermissionError(), False, PermissionError),
        (MemoryError(), False, MemoryError),
    ],
    ids=repr,
)
def test_errors_are_sorted_into_passing_and_final_ones(error: Exception, transient: bool, kind: type):
    assert is_transient(error) is transient
    assert type(as_os_error(error, "http://x/a.tar")) is kind


def test_a_failure_that_fsspec_calls_a_missing_file_is_known_by_its_cause():
    error = FileNotFoundError("http://x/a.tar")
    error.__cause__ = WebError(503)
    assert is_transient(cause_of(error))
    error.__cause__ = None
    assert not is_transient(cause_of(error))


def test_found_names_are_written_as_their_pattern_is():
    for url, path, name, wanted in (
        ("s3://bucket/a/*.tar", "bucket/a/*.tar", "bucket/a/0.tar", "s3://bucket/a/0.tar"),
        ("sftp://me@host/a/*.tar", "/a/*.tar", "/a/0.tar", "sftp://me@host/a/0.tar"),
        ("memory:///a/", "/a", "/a/0.tar", "memory:///a/0.tar"),
        ("http://h:8/a/", "http://h:8/a/", "http://h:8/a/0.tar", "http://h:8/a/0.tar"),
    ):
        found = Remote.__new__(Remote)
        found.url, found.path = url, path
        assert found._url_of(name) == wanted
