"""The page on training says what its JSON files hold."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")

from bench import training


def test_the_page_is_made_from_the_files_beside_it() -> None:
    assert training.PAGE.read_text(encoding="utf-8") == training.page()


def test_every_file_has_a_title_and_its_commands() -> None:
    paths = sorted(training.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["title"]
        assert content["commands"]
        assert all(command.startswith(("swift-kernels ", "    ")) for command in content["commands"])
