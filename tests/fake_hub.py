"""Fakes the API of a model hub on 127.0.0.1, in a thread: repositories, LFS uploads, commits."""

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from typing import Any

from fake_endpoint import Server

WRITES, READS = "token-that-writes", "token-that-reads"
"""The tokens that the hub knows."""


@dataclass
class Hub:
    """A running hub."""

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Requests that created repositories, by name (such as datasets/me/pairs)."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Committed files by repository and path."""
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metadata in the cards of other repositories, by name (such as models/me/base)."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by their digests."""
    pointers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Digests and sizes of the committed large files, by path."""
    chunks: str = ""
    """Folder in which the client stores large files in chunks (Xet); empty: it uploads to LFS."""
    refuses: str = ""
    """POST requests whose path contains this text get 403; empty: none."""


@contextmanager
def hub() -> Iterator[Hub]:
    running = Hub()

    def address(name: str) -> str:
        """Returns the URL of a repository's page; a model's path is only owner/name."""
        return f"{running.url}/{name.removeprefix('models/')}"

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            if "/xet-write-token/" in self.path:
                expires = int(time.time()) + 3600
                url = f"local://{running.chunks}"
                return self.reply(200, {"accessToken": "-", "exp": expires, "casUrl": url})
            name = self.path.removeprefix("/api/").partition("?")[0]
            if (card := running.cards.get(name)) is None:
                return self.reply(404, {"error": "Repository not found"})
            self.reply(200, {"id": name.partition("/")[2], "tags": [], "cardData": card})

        def do_PUT(self) -> None:
            oid = self.path.rpartition("/")[2]
            content = self.body()
            assert sha256(content).hexdigest() == oid
            running.objects[oid] = content
            self.reply(200, {})

        def do_POST(self) -> None:
            content, path = self.body(), self.path
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in (WRITES, READS):
                return self.reply(401, {"error": "Invalid username or password."})
            if running.refuses and running.refuses in path:
                return self.reply(403, {"error": "Refused."})
            if path == "/api/validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if token == READS:
                return self.reply(403, {"error": "You don't have the rights to create this."})
            if path == "/api/repos/create":
                repo = json.loads(content)
                name = f"{repo.get('type', 'model')}s/{repo['organization']}/{repo['name']}"
                new = running.repositories.setdefault(name, repo) is repo
                return self.reply(200 if new else 409, {"url": address(name)})
            if match := re.fullmatch(r"/api/(.+)/preupload/main", path):
                assert match[1] in running.repositories
                files = json.loads(content)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "regular" if file["path"].endswith(".md") else "lfs",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                return self.reply(200, {"files": modes})
            if path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**o, "actions": {"upload": {"href": f"{running.url}/lfs/{o['oid']}"}}}
                    for o in json.loads(content)["objects"]
                ]
                return self.reply(200, {"transfer": "basic", "objects": objects})
            if match := re.fullmatch(r"/api/(.+)/commit/main", path):
                stored = running.files.setdefault(match[1], {})
                for line in content.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        stored[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        running.pointers[value["path"]] = value
                        if not running.chunks:
                            stored[value["path"]] = running.objects[value["oid"]]
                commit = f"{address(match[1])}/commit/{'0' * 40}"
                return self.reply(200, {"commitUrl": commit, "commitOid": "0" * 40})
            self.reply(404, {"error": f"no route {path}"})

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def reply(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = Server(("127.0.0.1", 0), Handler)
    running.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
