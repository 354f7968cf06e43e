from __future__ import annotations

from typing import Any

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny.model()
