"""What a test does on a machine that has not what it needs."""

import os
from typing import NoReturn

import pytest


def without(reason: str) -> NoReturn:
    """Skip the test on a developer's machine; fail it in continuous integration, where a skipped test is not seen."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
