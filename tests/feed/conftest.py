"""A web server of this machine that says what a test wants it to say, and nothing of the network beyond."""

from __future__ import annotations

import http.server
import socket
import subprocess
import threading
from dataclasses import dataclass, field

import pytest

from nervure.feed import Fetcher

REAL = socket.getaddrinfo


@dataclass
class Feeds:
    port: int
    answers: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def url(self, path="/"):
        return f"http://127.0.0.1:{self.port}{path}"

    def say(self, path, *answers):
        """Each answer is (status, headers, body) or a function of the handler; the last one is repeated."""
        self.answers[path] = list(answers)
        return self.url(path)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def here_only(host, *rest, **options):
        # A name too long to be one never leaves the machine either.
        known = host in ("127.0.0.1", "localhost", "::1", "93.184.216.34", None) or len(host) > 70
        assert known, f"a test asks the network for {host}"
        return REAL(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", here_only)


@pytest.fixture
def feeds():
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            known.asked.append((self.path, dict(self.headers)))
            queue = known.answers[self.path]
            answer = queue.pop(0) if len(queue) > 1 else queue[0]
            try:
                if callable(answer):
                    answer(self)
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    known = Feeds(server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield known
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def slept():
    return []


@pytest.fixture
def fetcher(slept):
    return Fetcher(timeout=2, deadline=5, most=100_000, pause=0, keep=0, sleep=slept.append)


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Return a certificate of this machine that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("keys")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here to make a certificate with")
    return folder / "cert.pem", folder / "key.pem"
