"""Serves the page and its data on this machine."""

import json
import math
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from xtuner.core.errors import ConfigError
from xtuner.core.files import atomic_file
from xtuner.core.log import logger
from xtuner.tools.board.snapshot import Snapshots, export_all

PORT = 6060
LOCAL = "127.0.0.1"
MOST_BUCKETS = 4000
EXPORTED = 1500  # buckets of an exported curve
_FILES = {  # path → file, type
    "/uplot.js": ("uplot/uPlot.iife.min.js", "text/javascript"),
    "/uplot.css": ("uplot/uPlot.min.css", "text/css"),
    "/words.js": ("page/words.js", "text/javascript"),
    "/charts.js": ("page/charts.js", "text/javascript"),
    "/board.js": ("page/board.js", "text/javascript"),
    "/board.css": ("page/board.css", "text/css"),
    "/": ("page/index.html", "text/html"),
}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"


def read_page(name: str) -> str:
    """A file of the page or of the charting library."""
    return resources.files("xtuner.tools.board").joinpath(name).read_text(encoding="utf-8")


class Server(ThreadingHTTPServer):
    """Raises: ConfigError if the port is in use or the address is not this machine's."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, snapshots: Snapshots, host: str, port: int) -> None:
        self.snapshots, self.host = snapshots, host
        self.lock = threading.Lock()  # readers of files have positions
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as e:
            free = _find_free_port(host)
            raise ConfigError(
                f"the board cannot listen on port {port} of {host}: {getattr(e, 'strerror', None) or e}",
                where=f"--port {port}" if free else f"--host {host}",
                do=f"use a free port: --port {free}" if free else f"omit --host for {LOCAL}, or give 0.0.0.0",
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves closes its connections; anything else is a bug and is logged."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            logger.exception("the board could not answer a request")

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/"


def _find_free_port(host: str) -> int | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return None
        return int(probe.getsockname()[1])


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if not self._is_named_as_expected():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this board answers to its own address only\n")
        elif parts.path in _FILES:
            name, kind = _FILES[parts.path]
            self._send(HTTPStatus.OK, f"{kind}; charset=utf-8", read_page(name))
        elif (found := self._find(parts.path, parse_qs(parts.query))) is not None:
            self._send(HTTPStatus.OK, "application/json", _as_json(found))
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "not found\n")

    def _is_named_as_expected(self) -> bool:
        """Whether the request names this machine: a foreign page may have its own name resolved to 127.0.0.1."""
        if self.server.host not in (LOCAL, "localhost", "::1"):
            return True
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return name in (LOCAL, "localhost", "::1")

    def _find(self, path: str, query: dict[str, list[str]]) -> dict[str, Any] | None:
        def number(name: str, default: float) -> float:
            try:
                value = float(query[name][0])
            except (KeyError, ValueError):
                return default
            return default if math.isnan(value) else value

        identity = query.get("id", [""])[0]
        with self.server.lock:
            snapshots = self.server.snapshots
            if path == "/api/runs":
                return snapshots.list_runs()
            if path == "/api/details":
                return snapshots.show_details(identity)
            if path == "/api/run":
                buckets = min(max(int(min(number("buckets", 1000), MOST_BUCKETS)), 1), MOST_BUCKETS)
                smoothing = number("smoothing", -1)
                span = number("from", 0), number("to", math.inf)
                return snapshots.show_run(identity, *span, buckets, smoothing if smoothing >= 0 else None)
        return None

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(f"board: {format % args}")


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a setting or a fact of an event may be inf
        return json.dumps(_with_finite_numbers(value), ensure_ascii=False, separators=(",", ":"))


def _with_finite_numbers(value: Any) -> Any:
    """The value with other numbers as text."""
    if isinstance(value, dict):
        return {key: _with_finite_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_finite_numbers(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_report(snapshots: Snapshots, target: Path) -> int:
    """Write the page with all its data to one file; returns the number of runs in it."""
    found = export_all(snapshots, EXPORTED)
    # `<` could end the script element: names and samples are other people's text
    data = _as_json(found).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = read_page("page/index.html")
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    page = page.replace("<head>", f'<head>\n<meta http-equiv="Content-Security-Policy" content="{policy}">')
    for path, (name, kind) in _FILES.items():
        if kind == "text/css":
            page = page.replace(f'<link rel="stylesheet" href="{path[1:]}">', f"<style>{read_page(name)}</style>")
        elif kind == "text/javascript":
            page = page.replace(f'<script src="{path[1:]}"></script>', f"<script>{read_page(name)}</script>")
    page = page.replace("<!-- data -->", f"<script>const EXPORTED = {data};</script>")
    with atomic_file(target, "wb") as file:
        file.write(page.encode("utf-8", "replace"))
    return len(found["runs"])
