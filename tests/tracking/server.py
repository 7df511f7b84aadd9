"""A wandb server of this machine: the few endpoints that a run needs, and a record of what arrived."""

import gzip
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """What it was told, by run id. is_silent: it accepts connections and does not answer any more."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}
        self.num_requests, self.num_starts, self.refuses = 0, 0, False
        self.is_silent = threading.Event()
        self.end = threading.Event()

    @property
    def variables(self) -> dict[str, str]:
        """Environment of whoever is to find it."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}", "WANDB_API_KEY": "0" * 40}

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The run's history without wandb's own columns."""
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in self.history[run_id]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error."""

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """Of GraphQL."""
        if "mutation UpsertBucket" in query:
            return self._upsert(given)
        if "query RunResumeStatus" in query:
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": self._bucket(given["name"])}}
        if "query Viewer" in query:
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.variables['WANDB_BASE_URL']}/up/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "mutation CreateArtifact " in query:  # committed: its files, which the run has too, are not wanted
            return {
                "createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}}
            }
        return {"serverInfo": {"features": []}} if "ServerFeatures" in query else {}

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["name"]
        is_new = name not in self.runs
        self.num_starts += given["displayName"] is not None
        told = {key: value for key, value in given.items() if value is not None}
        self.runs[name] = self.runs.get(name, {}) | told
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}}
        bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "project": project}
        bucket["historyLineCount"] = len(self.history.get(name, []))
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        lines = self.history.get(name, [])
        tail = json.dumps([json.dumps(line) for line in lines[-1:]])
        counts = {"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0}
        last = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": json.dumps(lines[-1] if lines else {})}
        names = {"id": name, "name": name, "displayName": name, "config": "{}", "tags": [], "notes": None, "wandbConfig": "{}"}
        return names | counts | last


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self.server.files[self.path] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            return self._answer({"data": self.server.answer(asked["query"], asked.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            if self.server.refuses:
                return self._answer({"error": "permission denied"}, 403)
            lines = self.server.history.setdefault(self.path.split("/")[-2], [])
            told = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": len(lines), "content": []})
            lines[told["offset"] :] = map(json.loads, told["content"])
        return self._answer({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, value: Any, status: int = 200) -> None:
        if self.server.is_silent.is_set():
            self.server.end.wait()
        self.server.num_requests += 1
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server that runs; the caller puts its `variables` into the environment."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.end.set()
            server.shutdown()


def clean_environment() -> dict[str, str]:
    """This process's, without anything of wandb's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
