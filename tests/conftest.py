from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_configure() -> None:
    """Has tests and what they start heed interrupts: a shell has what it runs in the background ignore them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


ENOUGH_GB = 12
"""Of a GPU's memory: no test takes more."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Skips what a small GPU does not hold; on any other, running out of memory is a failure."""
    try:
        return (yield)
    except torch.OutOfMemoryError:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        if memory >= ENOUGH_GB:
            raise
        pytest.skip(f"needs more than the {memory:.0f} GB of this GPU")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Ends a worker of pytest-xdist in which a failed test has left an error of the GPU behind.

    Every later test of the process would fail with it. The report is sent by now, and a new worker goes on.
    """
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model, as the command line loads it."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def head_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    from swift_kernels import SwiftHead
    from swift_kernels.integrations.models import load_model

    folder = tmp_path_factory.mktemp("head")
    torch.manual_seed(0)
    SwiftHead.for_model(load_model(str(model_folder))[0]).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def rollouts(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Graded answers that a head can learn to tell apart; the header is that of a real run of this model."""
    from swift_kernels.cli import main
    from swift_kernels.integrations.models import load_model
    from swift_kernels.training.rollouts import Response, Rollout, RolloutWriter, read
    from tests.commands import rollout_args

    path = tmp_path_factory.mktemp("rollouts") / "r.jsonl"
    assert main(rollout_args(model_folder, path, problems=1)) == 0
    header = read(path).header
    path.unlink()
    _, tokenizer = load_model(str(model_folder))
    with RolloutWriter(path, header) as writer:
        for number in range(12):
            prompt = f"Problem {number}:"
            answers = []
            for index in range(4):
                text = ("yes" if index % 2 else "no") + str((number + index) % 10)
                answers.append(Response(tokenizer(text)["input_ids"], text, False, index % 2 == 1, text))
            writer.write(Rollout(str(number), str(number), prompt, "y", tokenizer(prompt)["input_ids"], answers))
    return path


def _load(name: str) -> tuple[Any, Any]:
    from swift_kernels.integrations.models import ModelError, load_model

    try:
        return load_model(name, dtype=torch.float32, device="cpu")
    except ModelError as error:
        pytest.skip(str(error))
