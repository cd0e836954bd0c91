"""Asking a server over HTTP for scores: several requests at a time, each with a deadline, tried again with pauses."""

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
PASSING = (429, 500, 502, 503, 504)  # statuses that may be over when one tries again
DAY = 86_400.0  # seconds
LONGEST_PAUSE = 300.0  # seconds that a server may ask to be left alone
LOCAL = ("localhost", "127.0.0.1", "::1")


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    retry_after: str | None
    content: bytes


class Client:
    """Posts JSON to one address, with what the environment variable `secret` holds as a bearer token.

    It asks no proxy and follows no redirection: secret and images are for the address that was given. `errors` holds
    the reasons of the last requests that failed in the end.

    Raises: UsageError naming `option` when the address is none, or what belongs to it cannot be.
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
        """What each body's reader makes of the answer; None where there was none that it could read.

        A reader raises ValueError, TypeError, LookupError or ArithmeticError on what it cannot read.
        """
        self.errors.clear()
        self.ended.clear()
        pool = DaemonPool(min(self.concurrent, len(bodies)))
        try:
            return list(pool.map(self._score, bodies, readers))
        finally:
            self.ended.set()  # after Ctrl+C nobody waits for an answer, or for the next attempt
            pool.shutdown(wait=False, cancel_futures=True)
            for line in list(self.open):
                hang_up(line)

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
            if answer.status not in PASSING:
                break
            asked = retry_after_seconds(answer.retry_after)
            if asked > LONGEST_PAUSE:
                reason += f" (and asks to wait {asked:.0f} s)"
                break
            pause = max(pause, asked)
        self.errors.append(reason)
        return None

    def printable(self, text: str) -> str:
        """A stranger's text without our secret and what would steer a terminal, and not too long."""
        text = text.replace(self.secret, "***") if self.secret else text
        text = "".join(c if c.isprintable() else " " for c in text)
        return text if len(text) <= LENGTH else f"{text[:LENGTH]} ..."

    def _post(self, body: bytes) -> Answer:
        """One attempt, from the connection to the last byte of the answer within `timeout` seconds.

        Raises: OSError or HTTPException when there is no whole answer by then.
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
            raise TimeoutError(f"nothing whole within {self.timeout:g} s") from error
        finally:
            connection.close()
        if time.monotonic() - begun >= self.timeout:  # what was cut off may look whole
            raise TimeoutError(f"nothing whole within {self.timeout:g} s")
        if len(content) > MOST_BYTES:
            raise http.client.HTTPException(f"its answer is longer than {MOST_BYTES} bytes")
        return Answer(response.status, response.headers["Retry-After"], content)

    @contextmanager
    def with_deadline(self, seconds: float, line: socket.socket) -> Iterator[None]:
        """Within it, whoever reads from a socket is woken after so many seconds: its own timeout is for each read."""
        timer = threading.Timer(seconds, hang_up, [line])
        timer.daemon = True
        timer.start()
        self.open.add(line)
        if self.ended.is_set():
            hang_up(line)
        try:
            yield
        finally:
            self.open.discard(line)
            timer.cancel()


def read_address(url: str, what: str) -> SplitResult:
    """An address such as http://127.0.0.1:8200/v1.

    Raises: UsageError on anything else, without quoting what may hold a secret.
    """
    try:
        address = urlsplit(url)
        good = address.scheme in ("http", "https") and address.port != 0 and (address.hostname or "").encode("idna")
    except ValueError:
        good = False
    if not good or not re.fullmatch(r"[!-~]+", url) or "@" in url or address.query or address.fragment:
        raise UsageError(f"{what}: expected an address like http://127.0.0.1:8200, without a user, password or query")
    return address


@functools.cache
def announce(section: str, variable: str, address: SplitResult) -> None:
    """Say once where a secret goes: a recipe that somebody else wrote may name both."""
    plain = address.scheme == "http" and address.hostname not in LOCAL
    print_main(f"{section} sends what is in {variable} to {address.netloc}" + (", not encrypted" if plain else ""))


def hang_up(line: socket.socket) -> None:
    """Wake the thread that reads from a socket."""
    with suppress(OSError):  # it has been closed
        line.shutdown(socket.SHUT_RDWR)


def error_message(answer: Answer) -> str:
    """The reason that a server gave: {"error": reason}, or {"error": {"message": reason}} as OpenAI's do."""
    try:
        said = from_json(answer.content)["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, KeyError, TypeError):
        return http.client.responses.get(answer.status, "no reason")


def retry_after_seconds(retry_after: str | None) -> float:
    """The seconds of a Retry-After header, a number or a date; 0 where there is none that can be read."""
    if not retry_after:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):  # it is neither
        return 0.0
