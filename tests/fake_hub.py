"""The few answers of the Hugging Face Hub that an upload needs, from this machine."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_the_tests"


class FakeHub(ThreadingHTTPServer):
    """Keeps what is committed to it.

    Attributes:
        files: by repository, path and content.
        user: what it says of the token's owner.
        refuses: whether every commit fails.
        asked: the paths that were asked for, in order.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.user: dict[str, Any] = {
            "name": "ada",
            "orgs": [{"name": "engines"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.refuses = False
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer(self.server.user)
        else:
            self.answer({"error": "Not found"}, 404)

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        content = self.body()
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[1] == "validate-yaml":
            header = yaml.safe_load(json.loads(content)["content"].split("---")[1])
            wrong = not isinstance(header.get("library_name"), str) or not isinstance(header.get("tags"), list)
            self.answer({"errors": [{"message": "the header is wrong"}] if wrong else [], "warnings": []})
        elif parts[1:] == ["repos", "create"]:
            asked = json.loads(content)
            name = f"{asked['organization'] or self.server.user['name']}/{asked['name']}"
            self.server.files.setdefault(name, {})
            self.answer({"url": f"{self.server.endpoint}/{name}"})
        elif parts[4] == "preupload":
            files = json.loads(content)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif self.server.refuses:
            self.answer({"error": "the disk of the Hub is full"}, 507)
        else:
            rows = [json.loads(line) for line in content.splitlines()]
            repository = "/".join(parts[2:4])
            self.server.files[repository] |= {
                row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in rows if row["key"] == "file"
            }
            address = f"{self.server.endpoint}/{repository}/commit/0123"
            self.answer({"commitUrl": address, "commitOid": "0123", "success": True})
