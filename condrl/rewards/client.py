"""Ask a server over HTTP for scores: several requests at a time, each with a deadline and retries after pauses."""

from __future__ import annotations

import functools
import http.client
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

from condrl.errors import LENGTH, UsageError, print_main
from condrl.io.records import from_json
from condrl.rewards.threads import DaemonPool
from condrl.rewards.wire import MOST_BYTES, read_secret

T = TypeVar("T")
RETRIED = (429, 500, 502, 503, 504)  # statuses after which another attempt may succeed
DAY = 86_400.0  # seconds
LONGEST_PAUSE = 300.0  # seconds; a server that asks for a longer one is not asked again
LOCAL = ("localhost", "127.0.0.1", "::1")


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    retry_after: str | None
    content: bytes


class Client:
    """Posts JSON to one address, with the value of the environment variable `secret` as a bearer token.

    It uses no proxy and follows no redirect, so that secret and images reach only the given address. `errors` holds
    the reasons why the last requests failed after all attempts.

    Raises: UsageError naming `option` when the address is invalid, or the setting beside it that is out of range.
    """

    def __init__(
        self, url: str, option: str, secret: str | None, timeout: float, retries: int, backoff: float, concurrent: int
    ) -> None:
        self.url = url
        self.address = read_address(url, f"config {option}")
        section = option.rpartition(".")[0]
        for name, value, least in (("retries", retries, 0), ("backoff", backoff, 0), ("concurrent", concurrent, 1)):
            if not value >= least:
                raise UsageError(f"config {section}.{name}: must be at least {least}, got {value}")
        if backoff > DAY:
            raise UsageError(f"config {section}.backoff: must be at most a day, got {backoff} seconds")
        if not 0 < timeout <= DAY:
            raise UsageError(f"config {section}.timeout: must be above 0 seconds and at most a day, got {timeout}")
        self.secret = read_secret(secret) if secret else None
        if secret and self.secret:
            announce(section, secret, self.address)
        self.timeout, self.retries, self.backoff, self.concurrent = timeout, retries, backoff, concurrent
        self.open: set[socket.socket] = set()
        self.ended = threading.Event()
        self.errors: deque[str] = deque(maxlen=100)

    def ask(self, bodies: Sequence[bytes], readers: Sequence[Callable[[bytes], T]]) -> list[T | None]:
        """What each body's reader returns for the answer; None for a request that failed after all attempts.

        A reader raises ValueError, TypeError, LookupError or ArithmeticError on what it cannot read.
        """
        self.errors.clear()
        self.ended.clear()
        pool = DaemonPool(min(self.concurrent, len(bodies)))
        try:
            return list(pool.map(self._score, bodies, readers))
        finally:
            self.ended.set()  # after Ctrl+C no thread waits for an answer, or for the next attempt
            pool.shutdown(wait=False, cancel_futures=True)
            for connection in list(self.open):
                hang_up(connection)

    def _score(self, body: bytes, read: Callable[[bytes], T]) -> T | None:
        pause, reason = 0.0, ""
        for attempt in range(self.retries + 1):
            if self.ended.wait(pause):
                break
            pause = min(LONGEST_PAUSE, self.backoff * 2 ** min(attempt, 30))
            try:
                answer = self._post(body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{self.url} did not answer: {self.printable(str(error)) or type(error).__name__}"
                continue
            if 200 <= answer.status < 300:
                try:
                    return read(answer.content)
                except (ValueError, TypeError, LookupError, ArithmeticError) as error:
                    reason = f"{self.url} sent an invalid answer: {self.printable(str(error))}"
                    continue
            reason = f"{self.url} answered {answer.status}: {self.printable(error_message(answer))}"
            if answer.status not in RETRIED:
                break
            asked = retry_after_seconds(answer.retry_after)
            if asked > LONGEST_PAUSE:
                reason += f" (and asks to wait {asked:.0f} s)"
                break
            pause = max(pause, asked)
        self.errors.append(reason)
        return None

    def printable(self, text: str) -> str:
        """A server's text without our secret and without control characters, cut to `LENGTH`."""
        text = text.replace(self.secret, "***") if self.secret else text
        text = "".join(c if c.isprintable() else " " for c in text)
        return text if len(text) <= LENGTH else f"{text[:LENGTH]} ..."

    def _post(self, body: bytes) -> Answer:
        """One attempt, with `timeout` seconds from the connection to the last byte of the answer.

        Raises: OSError or HTTPException when the answer is not complete by then.
        """
        kind = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.address.hostname or "", self.address.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"
        begun = time.monotonic()
        try:
            connection.connect()
            with self.with_deadline(self.timeout - (time.monotonic() - begun), connection.sock):
                connection.request("POST", self.address.path or "/", body, headers)
                response = connection.getresponse()
                content = response.read(MOST_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() - begun < self.timeout:
                raise
            raise TimeoutError(f"no complete answer within {self.timeout:g} s") from error
        finally:
            connection.close()
        if time.monotonic() - begun >= self.timeout:  # a truncated answer may look complete
            raise TimeoutError(f"no complete answer within {self.timeout:g} s")
        if len(content) > MOST_BYTES:
            raise http.client.HTTPException(f"its answer is longer than {MOST_BYTES} bytes")
        return Answer(response.status, response.headers["Retry-After"], content)

    @contextmanager
    def with_deadline(self, seconds: float, connection: socket.socket) -> Iterator[None]:
        """Within it, a socket is shut down after `seconds` in all; its own timeout restarts with each read."""
        timer = threading.Timer(seconds, hang_up, [connection])
        timer.daemon = True
        timer.start()
        self.open.add(connection)
        if self.ended.is_set():
            hang_up(connection)
        try:
            yield
        finally:
            self.open.discard(connection)
            timer.cancel()


def read_address(url: str, what: str) -> SplitResult:
    """An address such as http://127.0.0.1:8200/v1.

    Raises: UsageError on anything else, without quoting what may hold a secret.
    """
    try:
        address = urlsplit(url)
        valid = address.scheme in ("http", "https") and address.port != 0 and (address.hostname or "").encode("idna")
    except ValueError:
        valid = False
    if not valid or not re.fullmatch(r"[!-~]+", url) or "@" in url or address.query or address.fragment:
        raise UsageError(f"{what}: expected an address like http://127.0.0.1:8200, without a user, password or query")
    return address


@functools.cache
def announce(section: str, variable: str, address: SplitResult) -> None:
    """Say once where a secret goes: a config that somebody else wrote may name both."""
    plain = address.scheme == "http" and address.hostname not in LOCAL
    print_main(f"{section} sends what is in {variable} to {address.netloc}" + (", not encrypted" if plain else ""))


def hang_up(connection: socket.socket) -> None:
    """Wake the thread that reads from a socket."""
    with suppress(OSError):  # it has been closed
        connection.shutdown(socket.SHUT_RDWR)


def error_message(answer: Answer) -> str:
    """The reason that a server gave: {"error": reason}, or {"error": {"message": reason}} as OpenAI's API does."""
    try:
        error = from_json(answer.content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return http.client.responses.get(answer.status, "no reason")


def retry_after_seconds(retry_after: str | None) -> float:
    """The seconds of a Retry-After header, a number or a date; 0 when it is missing or unreadable."""
    if not retry_after:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):  # neither a number nor a date
        return 0.0
