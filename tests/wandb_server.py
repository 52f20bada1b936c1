"""A W&B server small enough to read: it takes what the client sends over HTTP, and keeps it to look at.

It answers as the real one does where the client goes by the answer: a run that is known is resumed, with the counts of
lines that it has; a line of a curve that is sent again for a place replaces the one that is there.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"


@dataclass
class SentRun:
    """One run as the server has it."""

    name: str
    about: dict[str, Any] = field(default_factory=dict)  # the last of each variable that UpsertBucket sent
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))  # of the file stream, by line
    uploads: dict[str, bytes] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)  # artifacts that went in
    made: list[str] = field(default_factory=list)  # and that came out
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Its rows in the order of the server's lines."""
        lines = self.files["wandb-history.jsonl"]
        return [json.loads(lines[number]) for number in sorted(lines)]

    @property
    def axes(self) -> dict[str, str | None]:
        """What each metric, or pattern of metrics, that was defined is drawn over; None where that is not said."""
        defined = self.config["_wandb"]["value"]["m"]
        # Numbers of W&B's protocol: name, glob_name, and step_metric_index, which counts from 1.
        named = [(metric.get("1") or metric["2"], metric.get("5")) for metric in defined]
        return {name: named[place - 1][0] if place else None for name, place in named}

    @property
    def machine(self) -> list[dict[str, Any]]:
        """Rows of what the machine of the run did."""
        # A copy: the server may be taking others meanwhile.
        return [json.loads(line) for line in list(self.files["wandb-events.jsonl"].values())]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.files["wandb-summary.json"]
        return json.loads(lines[max(lines)]) if lines else {}

    def curve(self, name: str, axis: str = "trainer/global_step") -> list[tuple[float, float]]:
        return [(row[axis], row[name]) for row in self.history if name in row]


class WandbServer(ThreadingHTTPServer):
    """Listens on a free port of this machine.

    Attributes:
        mood: ``well``; ``failing`` answers 500; ``silent`` never answers; ``refusing`` says that the key is wrong.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, SentRun] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        self.queries: list[str] = []
        self.unknown: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.mood = "well"
        self.lock = threading.RLock()

    def handle_error(self, *args: Any) -> None:
        """A client that hangs up is none."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def run(self, name: str) -> SentRun:
        return self.runs.setdefault(name, SentRun(name))

    # GraphQL: one method for each operation that needs more than an empty answer.

    def answer(self, operation: str, query: str, given: dict[str, Any]) -> dict[str, Any] | None:
        with self.lock:
            self.queries.append(operation)
            method = getattr(self, f"on_{operation}", None)
            if method is None:
                self.unknown.append(f"{operation}: {query} {given}")
                return {}
            return method(given)

    def on_Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": _VIEWER}

    def on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        known = given["name"] in self.runs
        run = self.run(given["name"])
        run.about |= {name: value for name, value in given.items() if value is not None}
        if given.get("config"):
            run.config |= json.loads(given["config"])
        return {"upsertBucket": {"bucket": self._bucket(run, given), "inserted": not known}}

    def _bucket(self, run: SentRun, given: dict[str, Any]) -> dict[str, Any]:
        project = run.about.get("project") or "kimivl"
        lines = {name: len(rows) for name, rows in run.files.items()}
        tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
        return {
            "id": run.name,
            "name": run.name,
            "displayName": run.about.get("displayName", run.name),
            "sweepName": None,
            "config": json.dumps(run.config),
            "project": {"id": project, "name": project, "entity": {"id": "me", "name": "me"}},
            "historyLineCount": lines.get("wandb-history.jsonl", 0),
            "eventsLineCount": lines.get("wandb-events.jsonl", 0),
            "logLineCount": lines.get("output.log", 0),
            "historyTail": tail,
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(run.summary),
            "tags": run.about.get("tags") or [],
            "wandbConfig": json.dumps({"t": 1}),
        }

    def on_ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def on_ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        links = [{"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": links}}

    # An artifact of a digest that is there already is the one that is there.

    def on_CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        sent = given["input"]
        name, known = sent["artifactCollectionName"], list(self.artifacts.values())
        same = [one for one in known if (one["name"], one["digest"]) == (name, sent["digest"])]
        if not same:
            version = sum(one["name"] == name for one in known)
            same = [sent | {"id": f"{name}:v{version}", "name": name, "state": "PENDING", "files": {}}]
            self.artifacts[same[0]["id"]] = same[0]
        made = same[0]
        if sent.get("runName") and made["state"] == "PENDING":
            self.run(sent["runName"]).made.append(made["id"])
        sequence = {"id": name, "latestArtifact": None}
        return {
            "createArtifact": {"artifact": {"id": made["id"], "state": made["state"], "artifactSequence": sequence}}
        }

    def on_CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        return self._manifest(given["artifactID"], "createArtifactManifest")

    def on_UpdateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        return self._manifest(given["artifactManifestID"], "updateArtifactManifest")

    def _manifest(self, artifact: str, operation: str) -> dict[str, Any]:
        file = {"id": artifact, "uploadUrl": f"{self.url}/manifest/{artifact}", "uploadHeaders": []}
        return {operation: {"artifactManifest": {"id": artifact, "file": file}}}

    def on_CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": None,
                "uploadUrl": f"{self.url}/artifact/{one['artifactID']}/{one['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": one["artifactID"]},
            }
            for one in given["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[given["artifactID"]]
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}

    def on_UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.run(given["input"]["runName"]).used.append(given["input"]["artifactID"])
        return {"useArtifact": {"artifact": {"id": given["input"]["artifactID"]}}}

    def on_UpsertView2(self, given: dict[str, Any]) -> dict[str, Any]:
        self.views.append(given)
        project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        about = {name: given.get(name) for name in ("name", "type", "displayName", "description", "spec")}
        view = about | {"id": f"view{len(self.views)}", "project": project, "updatedAt": None}
        return {"upsertView": {"view": view, "inserted": True}}

    on_upsertView = on_UpsertView2

    def on_GetProjects(self, given: dict[str, Any]) -> dict[str, Any]:
        about = {"id": "p", "name": "kimivl", "entityName": "me", "createdAt": "2026-01-01", "isBenchmark": False}
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        node = about | {"__typename": "Project", "user": None}
        return {"models": {"pageInfo": page, "edges": [{"node": node}]}}

    def on_ProjectInternalId(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "p", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}

    def on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        bucket = None if run is None or not run.about else self._bucket(run, given)
        return {"model": {"id": "p", "name": given["project"], "entity": {"id": "me", "name": "me"}, "bucket": bucket}}


_VIEWER = {
    "id": "me",
    "entity": "me",
    "username": "me",
    "name": "me",
    "flags": "{}",
    "teams": {"edges": [{"node": {"name": "me"}}]},
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *args: Any) -> None:
        """Nothing on the screen."""

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: Any = None, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _moody(self) -> bool:
        if self.server.mood == "silent":
            time.sleep(3600)
        if self.server.mood == "failing":
            self._reply({"error": "down"}, 500)
        if self.server.mood == "refusing":
            self._reply({"errors": [{"message": "user is not logged in"}]}, 401)
        return self.server.mood != "well"

    def do_POST(self) -> None:
        body = self._body()
        if self._moody():
            return
        if self.path.startswith("/graphql"):
            self._graphql(json.loads(body))
        elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self._stream(self.server.run(stream[1]), json.loads(body))
        else:
            self._reply(status=404)

    def _graphql(self, asked: dict[str, Any]) -> None:
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", asked["query"])
        operation = asked.get("operationName") or (found[1] if found else "unnamed")
        self._reply({"data": self.server.answer(operation, asked["query"], asked.get("variables") or {})})

    def _stream(self, run: SentRun, sent: dict[str, Any]) -> None:
        with self.server.lock:
            for name, chunk in (sent.get("files") or {}).items():
                for number, line in enumerate(chunk["content"], chunk["offset"]):
                    run.files[name][number] = line
            if sent.get("complete"):
                run.exit_code = sent.get("exitcode")
        self._reply({})

    def do_PUT(self) -> None:
        body = self._body()
        if not self._moody():
            self.server.blobs[self.path] = body
            self._reply()

    def do_GET(self) -> None:
        if not self._moody():
            blob = self.server.blobs.get(self.path)
            self._reply(blob, 404 if blob is None else 200)


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server for as long as the block lasts."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
