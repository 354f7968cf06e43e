"""The browser of the tests sees what it is there to see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, launch

PAGE = '<!doctype html><html lang="en"><head><title>t</title><link rel="icon" href="data:,">{head}</head><body>{body}'
FAULTS = {
    "console error": ("", "<script>console.error('boo', 7)</script>", ["error: boo 7"]),
    "console warning": ("", "<script>console.warn('hm')</script>", ["warning: hm"]),
    "exception": ("", "<script>undefinedName()</script>", ["error: ReferenceError: undefinedName is not defined"]),
    "late exception": (
        "",
        "<script>setTimeout(() => undefinedName(), 5)</script>",
        ["error: ReferenceError: undefinedName is not defined"],
    ),
    "image": (
        "",
        '<img src="http://example.com/x.png" alt="">',
        ["asked for http://example.com/x.png", "http://example.com/x.png: net::ERR_PROXY_CONNECTION_FAILED"],
    ),
    "script": ('<script src="https://cdn.example.com/a.js"></script>', "", ["asked for https://cdn.example.com/a.js"]),
    "style": ('<link rel="stylesheet" href="//example.com/a.css">', "", ["asked for file://example.com/a.css"]),
    "font": (
        "<style>@font-face { font-family: f; src: url(http://example.com/f.woff2) } p { font-family: f }</style>",
        "<p>text</p>",
        ["asked for http://example.com/f.woff2"],
    ),
    "file beside it": ("", '<img src="missing.png" alt="">', ["missing.png: net::ERR_FILE_NOT_FOUND"]),
    "request of a script": (
        "",
        "<script>fetch('http://localhost:8000/').catch(() => 0)</script>",
        ["asked for http://localhost:8000/"],
    ),
    "refused by the page's own policy": (
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:\">",
        '<img src="http://example.com/x.png" alt="">',
        ["violates the following Content Security Policy directive"],
    ),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as found:
        yield found


@pytest.mark.parametrize(("head", "body", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults_are_seen(browser: Browser, tmp_path: Path, head: str, body: str, expected: list[str]) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGE.format(head=head, body=body))
    complaints = browser.open(path).complaints
    for text in expected:
        assert any(text in complaint for complaint in complaints), complaints


def test_a_page_that_is_whole_has_none(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    body = '<p>text</p><img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=" alt="">'
    path.write_text(PAGE.format(head="<style>p { color: red }</style>", body=body + "<script>console.log(1)</script>"))
    page = browser.open(path)
    assert page.complaints == []
    assert page.evaluate("getComputedStyle(document.querySelector('p')).color") == "rgb(255, 0, 0)"
    with pytest.raises(AssertionError, match="nothing is not defined"):
        page.evaluate("nothing")
