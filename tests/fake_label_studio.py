"""As much of Label Studio 1.23's HTTP interface as is used, recorded from a real one: for the fast tests.

The slow tests run the same cases against a real one.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

EMAIL = "robot@example.com"


class Refuse(Exception):
    """A reply that is no success."""

    def __init__(self, status: int, detail: str):
        super().__init__(status, detail)
        self.status, self.detail = status, detail


class FakeStudio:
    """Projects, tasks and annotations in memory; they survive `stop` and `start`, as they do on a disk."""

    def __init__(self) -> None:
        self.token, self.port, self.clock = uuid.uuid4().hex, 0, 0
        self.projects: dict[int, dict[str, Any]] = {}
        self.tasks: dict[int, dict[str, Any]] = {}
        self.annotations: dict[int, dict[str, Any]] = {}
        self.files: dict[int, str] = {}
        self.views: list[Any] = []
        self.before: Callable[[str, str], None] = lambda method, path: None  # called before each request; may raise
        self.access: dict[str, int] = {}  # tokens that live for so many calls
        self.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to answer, where it did before."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler_for(self))
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Answer no more."""
        self.server.shutdown()
        self.server.server_close()

    def allow(self, header: str) -> None:
        """Refuse who is not known."""
        kind, _, key = header.partition(" ")
        if kind == "Bearer" and self.access.get(key, 0) > 0:
            self.access[key] -= 1
        elif kind != "Token" or key != self.token:
            raise Refuse(401, "Invalid token.")

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """The reply to one call."""
        for verb, pattern, name in ROUTES:
            if found := re.fullmatch(pattern, path.strip("/")):
                if verb == method:
                    return getattr(self, name)(query, body, *map(int, found.groups()))
        raise Refuse(404, "Not found.")

    def version(self, query: Any, body: Any) -> Any:
        return {"release": "1.23.2"}

    def refresh(self, query: Any, body: Any) -> Any:
        if body["refresh"] != f"e30.{self.token}.sig":
            raise Refuse(401, "Token is invalid or expired")
        self.access[fresh := uuid.uuid4().hex] = 5
        return {"access": fresh}

    def reset_token(self, query: Any, body: Any) -> Any:
        self.token = uuid.uuid4().hex
        return {"token": self.token}

    def make_project(self, query: Any, body: Any) -> Any:
        number = len(self.projects) + 1
        self.projects[number] = {"id": number, **body}
        return self.projects[number]

    def list_projects(self, query: Any, body: Any) -> Any:
        page, size = int(query.get("page", 1)), 2
        known = list(self.projects.values())[::-1]
        more = f"http://elsewhere/api/projects?page={page + 1}&page_size={size}" if len(known) > page * size else None
        return {"count": len(known), "next": more, "results": known[(page - 1) * size : page * size]}

    def project(self, number: int) -> dict[str, Any]:
        if number not in self.projects:
            raise Refuse(404, "No Project matches the given query.")
        return self.projects[number]

    def delete_project(self, query: Any, body: Any, number: int) -> None:
        del self.projects[number]

    def make_view(self, query: Any, body: Any) -> Any:
        self.views.append(body)
        return body

    def take_in(self, query: Any, body: Any, number: int) -> Any:
        self.project(number)
        if isinstance(body, bytes):
            assert query["commit_to_project"] == "false" and b"\x89PNG" in body
            self.files[upload := len(self.files) + 1] = f"upload/{number}/{uuid.uuid4().hex[:8]}-photo.png"
            return {"file_upload_ids": [upload], "task_count": 1}
        made = []
        for task in body:
            made.append(number_of := max(self.tasks, default=0) + 1)
            self.tasks[number_of] = {"id": number_of, "project": number, **task}
            self.touch(number_of)
        return {"task_ids": made, "task_count": len(made)}

    def upload(self, query: Any, body: Any, number: int) -> Any:
        return {"id": number, "file": self.files[number]}

    def touch(self, task: int) -> None:
        self.clock += 1
        self.tasks[task]["updated_at"] = self.clock

    def list_tasks(self, query: Any, body: Any) -> Any:
        self.project(int(query["project"]))
        page, size = int(query["page"]), int(query["page_size"])
        known = [task for task in self.tasks.values() if task["project"] == int(query["project"])]
        if page > 1 and len(known) <= (page - 1) * size:
            raise Refuse(404, "Invalid page.")
        shown = [{key: value for key, value in task.items() if key != "predictions"} for task in known]
        for task in shown:
            own = [a["was_cancelled"] for a in self.annotations.values() if a["task"] == task["id"]]
            task |= {"total_annotations": own.count(False), "cancelled_annotations": own.count(True)}
        return {"total": len(known), "tasks": shown[(page - 1) * size : page * size]}

    def delete_task(self, query: Any, body: Any, number: int) -> None:
        del self.tasks[number]
        self.annotations = {n: a for n, a in self.annotations.items() if a["task"] != number}

    def annotate(self, query: Any, body: Any, task: int) -> Any:
        number = max(self.annotations, default=0) + 1
        own = {
            "id": number,
            "task": task,
            "created_username": f" {EMAIL}, 1",
            "was_cancelled": False,
            "lead_time": None,
        }
        self.annotations[number] = {**own, **body}
        self.touch(task)
        return self.annotations[number]

    def show_task(self, query: Any, body: Any, task: int) -> Any:
        return {**self.tasks[task], "annotations": [a for a in self.annotations.values() if a["task"] == task]}

    def change(self, query: Any, body: Any, number: int) -> Any:
        self.annotations[number] |= body
        self.touch(self.annotations[number]["task"])
        return self.annotations[number]

    def delete(self, query: Any, body: Any, number: int) -> None:
        self.touch(self.annotations.pop(number)["task"])


ROUTES = (
    ("GET", "api/version", "version"),
    ("POST", "api/token/refresh", "refresh"),
    ("POST", "api/current-user/reset-token", "reset_token"),
    ("POST", "api/projects", "make_project"),
    ("GET", "api/projects", "list_projects"),
    ("DELETE", r"api/projects/(\d+)", "delete_project"),
    ("POST", "api/dm/views", "make_view"),
    ("POST", r"api/projects/(\d+)/import", "take_in"),
    ("GET", r"api/import/file-upload/(\d+)", "upload"),
    ("GET", "api/tasks", "list_tasks"),
    ("DELETE", r"api/tasks/(\d+)", "delete_task"),
    ("POST", r"api/tasks/(\d+)/annotations", "annotate"),
    ("GET", r"api/tasks/(\d+)", "show_task"),
    ("PATCH", r"api/annotations/(\d+)", "change"),
    ("DELETE", r"api/annotations/(\d+)", "delete"),
)


def handler_for(studio: FakeStudio) -> type[BaseHTTPRequestHandler]:
    """The HTTP side."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            body: Any = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                studio.before(self.command, self.path)
                if "token/refresh" not in self.path:
                    studio.allow(self.headers.get("Authorization", ""))
                if self.headers.get("Content-Type") == "application/json":
                    body = json.loads(body) if body else None
                status, reply = 200, studio.answer(self.command, parts.path, query, body)
            except Refuse as refused:
                status, reply = refused.status, {"detail": refused.detail, "status_code": refused.status}
            text = b"" if reply is None else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PATCH = do_DELETE = do_GET

    return Handler
