"""A server of object storage (moto's) in a process of its own, and a proxy in front of it that fails on request."""

import contextlib
import http.client
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import CACHE

CLIENT, SERVER = CACHE / "s3-client-0.12.1", CACHE / "s3-server-5.2.5"
BUCKET = "bucket"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzzzzSECRET"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAZZZZZZZZZZZZTEST", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
SIGNED = f"AWS4-HMAC-SHA256 Credential={KEYS['AWS_ACCESS_KEY_ID']}/20260101/us-east-1/s3/aws4_request, Signature=0"
Fault = Callable[[str, str], "str | int | None"]


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards requests. `fault(method, path)` says what happens instead: a status, or "cut" for an answer that ends
    in its middle, or None. `requests` records what was asked."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = port
        self.fault: Fault = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed

    @contextlib.contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        self.fault = fault
        try:
            yield
        finally:
            self.fault = lambda method, path: None

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes, Any]:
        there = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        there.request(method, path, body, {"Authorization": SIGNED})
        answer = there.getresponse()
        return answer.status, answer.read(), answer.headers

    def put(self, key: str, data: bytes) -> None:
        assert self.request("PUT", f"/{BUCKET}/{key}", data)[0] == 200

    def put_folder(self, folder: Path, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def keys(self, prefix: str = "") -> list[str]:
        body = self.request("GET", f"/{BUCKET}?list-type=2&prefix={prefix}")[1].decode()
        return re.findall(r"<Key>([^<]*)</Key>", body)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path))
        fault = self.server.fault(self.command, self.path)
        if isinstance(fault, int):
            code = {503: "SlowDown", 500: "InternalError", 403: "AccessDenied"}.get(fault, "Error")
            answer = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            self.send_response(fault)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else answer)
            return
        there = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        there.request(self.command, self.path, body, dict(self.headers))
        answered = there.getresponse()
        data = answered.read()
        self.send_response(answered.status)
        for name, value in answered.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date", "content-length"):
                self.send_header(name, value)
        size = answered.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def start_server() -> Iterator[Proxy]:
    """Also makes obstore importable here."""
    if not ((SERVER / "installed").exists() and (CLIENT / "installed").exists()):
        pytest.skip("moto and obstore are not here: make s3")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SERVER)}, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    lines = iter(server.stderr.readline, "")
    try:
        port = next(int(found[1]) for line in lines if (found := re.search(r"Running on http://\S+:(\d+)", line)))
        threading.Thread(target=lambda: list(lines), daemon=True).start()  # its log of requests
        sys.path.append(str(CLIENT))
        with Proxy(port) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            assert proxy.request("PUT", f"/{BUCKET}")[0] == 200
            yield proxy
            proxy.shutdown()
    finally:
        sys.path[:] = [p for p in sys.path if p != str(CLIENT)]
        server.kill()
        server.wait()
