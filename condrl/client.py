"""Asking a server over HTTP for scores: several requests at a time, tried again with growing pauses."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from condrl.errors import UsageError
from condrl.record import from_json
from condrl.wire import MOST_BYTES

T = TypeVar("T")
PASSING = (429, 500, 502, 503, 504)  # statuses that may be over when one tries again


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody: the token and the images are for the address that was given."""

    def redirect_request(self, *_: Any) -> None:
        return None


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay)  # and asks no proxy


class Client:
    """Posts JSON to one address, with a bearer token if the environment variable `token` holds one.

    `errors` holds the reasons of the last requests that failed in the end.
    Raises: UsageError naming `option` when the address is none, or what belongs to it cannot be.
    """

    def __init__(
        self, url: str, option: str, token: str | None, timeout: float, retries: int, backoff: float, concurrent: int
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"config {option}: {url!r} is no address like http://127.0.0.1:8200")
        section = option.rpartition(".")[0]
        for name, value, least in (("retries", retries, 0), ("backoff", backoff, 0), ("concurrent", concurrent, 1)):
            if not value >= least:
                raise UsageError(f"config {section}.{name}: must be at least {least}, got {value}")
        if not timeout > 0:
            raise UsageError(f"config {section}.timeout: must be above 0 seconds, got {timeout}")
        self.url, self.token = url, token
        self.timeout, self.retries, self.backoff, self.concurrent = timeout, retries, backoff, concurrent
        self.errors: deque[str] = deque(maxlen=100)

    def ask(self, bodies: Sequence[bytes], readers: Sequence[Callable[[bytes], T]]) -> list[T | None]:
        """What each body's reader makes of the answer; None where there was none that it could read.

        A reader raises ValueError, TypeError, LookupError or ArithmeticError on what it cannot read.
        """
        self.errors.clear()
        with ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(self._answer, bodies, readers))

    def _answer(self, body: bytes, read: Callable[[bytes], T]) -> T | None:
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return read(self._post(body))
            except urllib.error.HTTPError as error:
                reason = f"{self.url} answered {error.code}: {said_in(error)}"
                if error.code not in PASSING:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = f"{self.url} did not answer: {getattr(error, 'reason', error)}"
            except (ValueError, TypeError, LookupError, ArithmeticError) as error:
                reason = f"{self.url} gave an answer that is none: {error}"
        self.errors.append(reason)
        return None

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.token and (token := os.environ.get(self.token)):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url, body, headers)
        with DIRECT.open(request, timeout=self.timeout) as answer:
            content: bytes = answer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES} bytes")
        return content


def said_in(error: urllib.error.HTTPError) -> str:
    """The reason that a server gave: {"error": reason}, or {"error": {"message": reason}} as OpenAI's do."""
    try:
        said = from_json(error.read(10_000))["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
