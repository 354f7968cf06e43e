from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.hub import AccessError, HubError, check_access
from swift_kernels.integrations.models import hub_id
from tests.architectures import tiny_model
from tests.fake_hub import TOKEN, FakeHub


def test_a_head_is_uploaded(fake_hub: FakeHub, tmp_path: Path) -> None:
    head = SwiftHead.for_model(tiny_model("llama"))
    address = head.push_to_hub("ada/my-head")
    assert address == f"{fake_hub.endpoint}/ada/my-head/commit/0123"
    for name, content in fake_hub.files["ada/my-head"].items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(SwiftHead.from_pretrained(str(tmp_path)).weight, head.weight)


@pytest.mark.parametrize("repo_id", ["my-head", "ada/my-head", "engines/my-head"])
def test_the_owner_may_write(fake_hub: FakeHub, repo_id: str) -> None:
    check_access(repo_id)
    assert fake_hub.asked == ["/api/whoami-v2"], "nothing was made"


@pytest.mark.parametrize(
    ("repo_id", "token", "role", "message"),
    [
        ("a/b/c", TOKEN, "write", "'a/b/c' is no name for a repository"),
        ("bob/my-head", TOKEN, "write", "the token of the Hub is for ada, engines"),
        ("ada/my-head", TOKEN, "read", "the token of ada is for reading alone: run `hf auth login`"),
        ("ada/my-head", "hf_revoked", "write", "does not accept the token: run `hf auth login`"),
        ("ada/my-head", None, "write", "without a token of the Hub: run `hf auth login`, or set HF_TOKEN"),
    ],
    ids=["name", "owner", "reading", "revoked", "no-token"],
)
def test_what_would_be_refused_is_said_at_once(
    fake_hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    repo_id: str,
    token: str | None,
    role: str,
    message: str,
) -> None:
    fake_hub.user["auth"]["accessToken"]["role"] = role
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(AccessError, match=message):
        check_access(repo_id)


def test_a_hub_that_does_not_answer(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="the Hub does not answer"):
        check_access("ada/my-head")
    with pytest.raises(HubError, match="was not pushed to"):
        SwiftHead.for_model(tiny_model("llama")).push_to_hub("ada/my-head")


def test_names_of_models_on_the_hub(tmp_path: Path) -> None:
    assert hub_id("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert hub_id("gpt2") == "gpt2"
    assert [hub_id(name) for name in (str(tmp_path), "model.gguf", "/nowhere/model", "../model")] == [None] * 4


def test_without_a_token_the_library_itself_is_asked(tmp_path: Path) -> None:
    # In a process of its own: elsewhere other imports have loaded what the library loads when it is used.
    code = "from swift_kernels import hub; hub.check_access('someone/head')"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_TOKEN", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (
        "AccessError: someone/head cannot be pushed to without a token of the Hub: run `hf auth login`" in done.stderr
    )
