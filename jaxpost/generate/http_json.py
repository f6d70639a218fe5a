"""JSON over HTTP with retries, from the standard library; every failure is one clear sentence."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_LARGEST = 1 << 28
_LONGEST_PAUSE = 60.0
_MOST_SECONDS = 1e9


class ServerError(RuntimeError):
    """What went wrong between us and a server; `status` is the HTTP status, or None where no answer came."""

    def __init__(self, told: str, *, status: int | None = None):
        super().__init__(told)
        self.status = status


@dataclass(frozen=True)
class Server:
    """An address and how patiently it is asked.

    Attributes:
      url: its base, http or https; without a path, /v1 is meant.
      api_key: sent as a bearer token; never shown.
      timeout: seconds to wait for a connection, and then for each part of an answer.
      retries: more tries after a first one that failed for a reason that may pass.
      backoff: seconds before the first of them; doubled every time. A server's Retry-After counts instead.

    Raises: ValueError for an address that is none, a key that no header can hold, waits that are none.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    retries: int = 4
    backoff: float = 0.5

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise ValueError(f"{self.url!r} is not an address; write it as http://localhost:8000/v1")
        # http.client would show the key in its complaint.
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("the API key holds a line break or another character that no header can: give it alone")
        if not 0 < self.timeout <= _MOST_SECONDS or self.retries < 0 or not self.backoff >= 0:
            raise ValueError(
                f"timeout must be above 0 and at most {_MOST_SECONDS:g} seconds, and retries and backoff not below 0"
            )

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer. Raises: ServerError, after the last try."""
        tried = 0
        while True:
            try:
                return self._once(method, path, body)
            except _Passing as error:
                if tried == self.retries:
                    tries = f", after {tried + 1} tries" if tried else ""
                    raise ServerError(f"{error}{tries}", status=error.status) from error.__cause__
                pause = self.backoff * 2**tried if error.pause is None else error.pause
            tried += 1
            time.sleep(min(pause, _LONGEST_PAUSE))

    def _once(self, method: str, path: str, body: Any) -> Any:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
            connection.request(method, (parts.path.rstrip("/") or "/v1") + path, data, headers)
            response = connection.getresponse()
            answer = response.read(_LARGEST + 1)
        except TimeoutError as error:
            raise _Passing(f"{self.url} did not answer within {self.timeout:g} s") from error
        except ssl.SSLError as error:
            raise ServerError(f"no secure connection to {self.url}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise _Passing(f"{self.url} cannot be reached ({why}): is the server running?") from error
        finally:
            connection.close()
        if response.status != 200:
            told = f"{self.url} answered {response.status}: {_message(answer, response)}"
            if response.status in _RETRIED:
                raise _Passing(told, status=response.status, pause=_seconds(response.getheader("Retry-After")))
            raise ServerError(told, status=response.status)
        if len(answer) > _LARGEST:
            raise ServerError(f"{self.url} answered with more than {_LARGEST >> 20} MiB")
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{self.url} answered with what is not JSON: {_shown(answer)}") from error


def _is_address(url: str) -> bool:
    """Whether requests can be sent there; http.client has many ways to complain of what is none."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # a label may be too long, or empty
        good = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
    except ValueError:
        return False
    return good and not (parts.query or parts.fragment or parts.username)


class _Passing(ServerError):
    """May pass; `pause` is how many seconds the server asks us to wait."""

    def __init__(self, told: str, *, status: int | None = None, pause: float | None = None):
        super().__init__(told, status=status)
        self.pause = pause


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isascii() and header.isdigit() else None


def _message(answer: bytes, response: http.client.HTTPResponse) -> str:
    """What the server says of its error, in any of the forms that servers use."""
    if 300 <= response.status < 400:
        return f"it points to {response.getheader('Location')!r}; give that address if you trust it"
    try:
        told = json.loads(answer)
    except (ValueError, RecursionError):
        return _shown(answer)
    for key in ("error", "message", "detail"):
        while isinstance(told, dict) and key in told:
            told = told[key]
    return _shown(told if isinstance(told, str) else json.dumps(told))


def _shown(text: str | bytes) -> str:
    """The beginning of a stranger's text, its control characters written out."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return repr(text[:300] + (" ..." if len(text) > 300 else ""))
