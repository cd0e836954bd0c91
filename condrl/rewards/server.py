"""Answer requests for scores over HTTP, within bounds: the other side of condrl/rewards/client.py."""

from __future__ import annotations

import hmac
import io
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from condrl.errors import brief, print_main
from condrl.io.records import to_json
from condrl.rewards.client import hang_up
from condrl.rewards.scoring import Reward
from condrl.rewards.threads import DaemonPool
from condrl.rewards.wire import MOST_BYTES, unpack

MOST_CONNECTIONS = 128  # at a time
MOST_WAITING = 64  # requests whose bodies are in memory
MOST_HELD = 2**29  # bytes of those bodies
MOST_HEAD = 2**16  # bytes of a request's headers
SECONDS = 30.0  # for a client to send its request
LONGEST_WAIT = 60  # seconds that a client is asked to wait, at most


class Server(ThreadingHTTPServer):
    """A reward behind HTTP: requests are read at once, within bounds, and scored one by one in the order they came."""

    daemon_threads = True
    request_queue_size = 1024  # connections that the system keeps until they are accepted

    def __init__(self, address: tuple[str, int], reward: Reward, token: str | None, device: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.reward, self.token, self.device = reward, token, device
        self.connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.queue = Queue()
        self.scorer = DaemonPool(1)
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.connections.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except BaseException:  # no further thread can be started
                self.connections.release()
                raise
        else:
            with suppress(OSError):
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n")
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report nothing about a client that has gone, or one that waits while the server ends."""
        error = sys.exception()
        if error and not isinstance(error, OSError | CancelledError):
            print_main(f"warning: no answer to {client_address[0]}: {brief(error)}")

    def server_close(self) -> None:
        super().server_close()
        self.scorer.shutdown(wait=False, cancel_futures=True)

    def answer(self, body: bytes, gone: Callable[[], bool]) -> tuple[int, dict[str, Any]] | None:
        """The status and content for a request: scores (null: failed) or an error; None if the client is gone."""
        if gone():
            return None
        with torch.no_grad():
            try:
                samples, rows = unpack(body)
            except Exception as error:
                return 400, {"error": brief(error)}
            begun = time.monotonic()
            try:
                found = self.reward(samples.to(self.device), rows)
            except BaseException as error:  # a reward may raise anything
                return 500, {"error": brief(error)}
            self.queue.took(time.monotonic() - begun)
        return 200, {"scores": found.tolist()}


class Queue:
    """The requests whose bodies are in memory, and how long one takes to be scored."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = self.bytes = 0
        self.seconds = 0.0

    def enter(self, size: int) -> bool:
        """Whether there is room for a request of `size` bytes; if so, it is admitted."""
        with self.lock:
            room = self.count < MOST_WAITING and (not self.count or self.bytes + size <= MOST_HELD)
            if room:
                self.count, self.bytes = self.count + 1, self.bytes + size
            return room

    def leave(self, size: int) -> None:
        with self.lock:
            self.count, self.bytes = self.count - 1, self.bytes - size

    def took(self, seconds: float) -> None:
        self.seconds = seconds if not self.seconds else 0.8 * self.seconds + 0.2 * seconds

    @property
    def wait(self) -> int:
        """Seconds after which half of those that wait now will have been scored."""
        return min(LONGEST_WAIT, max(1, math.ceil(self.count * self.seconds / 2)))


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS  # for each read and write; `deadline` is for all that a client sends

    def setup(self) -> None:
        super().setup()
        self.deadline = threading.Timer(SECONDS, hang_up, [self.connection])
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self) -> None:
        self.deadline.cancel()
        super().finish()

    def parse_request(self) -> bool:
        """The head of a request, if it is not too long."""
        stream, head = self.rfile, b""
        while (line := stream.readline(MOST_HEAD)).strip():
            head += line
            if len(head) > MOST_HEAD:
                self.send_error(431)
                return False
        self.rfile = io.BytesIO(head + b"\r\n")
        try:
            return super().parse_request()
        finally:
            self.rfile = stream

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class answers, as JSON."""
        self.request_version = self.protocol_version  # also to what it cannot read
        self.requestline, self.command = "", ""
        self.reply(code, {"error": message or responses.get(code, "")})

    def do_GET(self) -> None:
        if not self.refused():
            self.reply(200, {"reward": self.server.reward.name})

    def do_POST(self) -> None:
        size = int(length) if re.fullmatch("[0-9]{1,10}", length := self.headers.get("Content-Length", "")) else None
        if self.refused():
            return self.drain()
        if self.headers.get_content_type() != "application/json":
            self.reply(415, {"error": "a request must be application/json"})
            return self.drain()
        if size is None or size > MOST_BYTES:
            self.reply(413, {"error": f"a request needs a Content-Length of at most {MOST_BYTES} bytes"})
            return self.drain()
        if not self.server.queue.enter(size):
            self.reply(503, {"error": "too many requests are waiting"}, {"Retry-After": str(self.server.queue.wait)})
            return self.drain()
        try:
            body = self.rfile.read(size)
            self.deadline.cancel()
            if len(body) == size and (found := self.server.scorer.submit(self.server.answer, body, self.gone).result()):
                self.reply(*found)
        finally:
            self.server.queue.leave(size)

    def refused(self) -> bool:
        """Whether the client is refused, and if so, the answer. Web pages, which send an Origin, always are."""
        given, token = self.headers.get("Authorization", ""), self.server.token
        hosts = self.headers.get_all("Host", [])
        if "Origin" in self.headers:
            self.reply(403, {"error": "web pages are not answered"})
        elif not token and not (len(hosts) == 1 and is_local(hosts[0])):
            self.reply(403, {"error": "without a token, Host must be localhost, 127.0.0.1 or [::1]"})
        elif token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            self.reply(401, {"error": "the token is missing or wrong"})
        else:
            return False
        return True

    def gone(self) -> bool:
        """Whether the client has hung up, so that nobody would receive the answer."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    def drain(self) -> None:
        """Discard what a client is still sending, or it would see a broken connection instead of the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        while self.rfile.read1(2**16):  # until it hangs up, or the deadline
            pass

    def reply(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = to_json(content).encode()
        self.send_response(status)
        fixed = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in {**fixed, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a run makes many requests."""


def is_local(host: str) -> bool:
    """Whether a Host header names this machine, with a port or without."""
    return bool(re.fullmatch(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", host.lower()))
