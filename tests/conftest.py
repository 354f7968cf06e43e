from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", params=["smollm2", "gemma3-270m"])
def real_model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model with its real weights, and its tokenizer."""
    return _load(request.param)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    return _load("smollm2")


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A `FakeHub` that the library takes for the Hub, with the token of one who may write there."""
    constants = pytest.importorskip("huggingface_hub").constants
    from tests.fake_hub import TOKEN, FakeHub

    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _load(name: str) -> tuple[Any, Any]:
    from swift_kernels.integrations.models import ModelError, load_model

    try:
        return load_model(name, dtype=torch.float32, device="cpu")
    except ModelError as error:
        pytest.skip(str(error))
