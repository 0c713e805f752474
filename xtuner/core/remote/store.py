"""Requests to a bucket, with retries.

A request that fails for a reason that may pass (no connection, a cut one, 5xx, 429) is repeated after a pause that
doubles each time, with jitter, so that the ranks of a run do not return together. After `ATTEMPTS` failures, or
`PATIENCE` seconds, it is an error. obstore's own retries end when a body begins; they serve the parts of uploads only.
"""

import errno
import functools
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from xtuner.core.activity import record_progress
from xtuner.core.errors import CheckpointError, ConfigError, XTunerError
from xtuner.core.log import logger
from xtuner.core.remote.url import Url, advise_on_credentials, advise_on_endpoint, find_credentials, store_options

T = TypeVar("T")
PART = 2**23  # bytes of a request
MOST_PARTS = 9_000  # of an upload; S3 permits 10,000
STREAMS = 8  # parts of a file at a time
ATTEMPTS, VARIABLE = 10, "XTUNER_OBJECT_ATTEMPTS"
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0  # s
PATIENCE = 180.0  # s
_TIMES = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "10m"}
_TEMPORARY = {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling", "RequestLimitExceeded"}
_STARTED: dict[str, int] = {}  # the process in which the threads of obstore run
_WRONG_BUCKET = {"NoSuchBucket", "InvalidBucketName", "PermanentRedirect"}


class Entry(NamedTuple):
    """An object. `version` follows from its ETag: another number means other contents."""

    key: str
    size: int
    version: int


class ChangedObjectError(Exception):
    """An object is not the one that was listed."""


def open_store(url: Url) -> "Store":
    """The store of a bucket, by what the environment says now. Raises: ConfigError."""
    options = tuple(store_options(url).items())
    by_keys = find_credentials(url.scheme) is not None
    return _open_store(url.scheme, url.bucket, options, by_keys, _number_of_attempts(), os.getpid())


@functools.lru_cache(64)
def _open_store(
    scheme: str, bucket: str, options: tuple[tuple[str, Any], ...], by_keys: bool, attempts: int, pid: int
) -> "Store":
    return Store(Url(scheme, bucket, ""), dict(options), by_keys, attempts)


def _number_of_attempts() -> int:
    text = os.environ.get(VARIABLE) or str(ATTEMPTS)
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise ConfigError(f"{VARIABLE} = {text!r} is not a number from 1 to 1000", where=VARIABLE)
    return int(text)


class Store:
    """A bucket. All methods raise ConfigError if it cannot be accessed with these credentials, CheckpointError if it
    still fails after the retries, FileNotFoundError for an object that does not exist."""

    def __init__(self, bucket: Url, options: dict[str, Any], by_keys: bool, attempts: int) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError:
            raise ConfigError(
                f"{bucket.scheme}:// needs the package obstore", where=str(bucket), do="pip install 'xtuner[s3]'"
            ) from None
        self.bucket, self.attempts = bucket, attempts
        self._calls = obstore
        if _STARTED.setdefault("process", os.getpid()) != os.getpid():
            raise CheckpointError(
                "object storage is accessed in a forked process, where its client would wait forever",
                where=str(bucket),
                do="start the process by spawn or forkserver",
            )
        provider: Any = {}
        if by_keys:  # read again when a request is signed: a file may be renewed
            provider = {"credential_provider": lambda: {**(find_credentials(bucket.scheme) or {}), "expires_at": None}}

        def connect(retries: int) -> Any:
            first, longest, patience = (timedelta(seconds=s) for s in (FIRST_PAUSE, LONGEST_PAUSE, PATIENCE))
            pauses = {"init_backoff": first, "max_backoff": longest, "base": 2}
            retry = {"max_retries": retries, "backoff": pauses, "retry_timeout": patience}
            client = {"allow_http": True, **_TIMES}
            return S3Store(bucket.bucket, **options, **provider, client_options=client, retry_config=retry)

        self._store = connect(0)
        self._parts = connect(attempts - 1)  # of a file: if one fails, it alone is sent again

    def list_objects(self, prefix: str) -> list[Entry]:
        """All objects below a prefix (a folder, without the slash at its end), by key."""

        def read_all() -> list[Entry]:
            chunks = self._calls.list(self._store, prefix or None)
            return sorted(Entry(e["path"], e["size"], _version(e)) for chunk in chunks for e in chunk)

        return self._repeat(read_all, prefix, "listed")

    def head(self, key: str) -> Entry:
        found = self._repeat(lambda: self._calls.head(self._store, key), key, "read")
        return Entry(key, found["size"], _version(found))

    def read(self, key: str, begin: int = 0, end: int | None = None, version: int | None = None) -> bytes:
        """Bytes `begin` to `end` of an object; all of it by default. Raises: ChangedObjectError."""

        def get() -> bytes:
            options = {} if end is None else {"range": (begin, end)}
            found = self._calls.get(self._store, key, options=options)
            if version is not None and _version(found.meta) != version:
                raise ChangedObjectError(key)
            return bytes(found.bytes())

        if end is not None and end <= begin:
            return b""
        return self._repeat(get, key, "read")

    def read_ranges(self, key: str, ranges: list[tuple[int, int]], version: int) -> list[bytes]:
        """As `read`, of several ranges at a time."""
        with ThreadPoolExecutor(min(2 * STREAMS, len(ranges) or 1), "xtuner-object") as pool:
            return list(pool.map(lambda r: self.read(key, r[0], r[1], version), ranges))

    def download(self, entry: Entry, fd: int, stopped: threading.Event | None = None) -> None:
        """Write an object to an open file, in parts of `PART` bytes. Raises: ChangedObjectError, OSError."""

        def copy(begin: int) -> None:
            if stopped and stopped.is_set():
                raise InterruptedError(errno.EINTR, "no longer needed", entry.key)
            data = memoryview(self.read(entry.key, begin, min(begin + PART, entry.size), entry.version))
            record_progress(f"{entry.key}: {begin:,} bytes read")
            while len(data):
                written = os.pwrite(fd, data, begin)
                data, begin = data[written:], begin + written

        parts = range(0, entry.size, PART)
        if len(parts) == 1:
            copy(0)
            return
        with ThreadPoolExecutor(min(STREAMS, len(parts) or 1), "xtuner-object") as pool:
            list(pool.map(copy, parts))

    def upload(self, path: Path, key: str) -> None:
        """Write a file; the object appears when all of it is there. Raises: OSError."""
        size = max(PART, -(-os.stat(path).st_size // MOST_PARTS))
        parts = {"chunk_size": size, "max_concurrency": STREAMS}
        self._repeat(lambda: self._calls.put(self._parts, key, path, **parts), key, "written")
        record_progress(f"{key} written")

    def write(self, key: str, data: bytes) -> None:
        self._repeat(lambda: self._calls.put(self._store, key, data), key, "written")

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self._repeat(functools.partial(self._calls.delete, self._store, key), key, "deleted")
            except FileNotFoundError:
                continue

    def _repeat(self, action: Callable[[], T], key: str, verb: str) -> T:
        url, begin = self.bucket.join(key), time.monotonic()
        for number in self._count_attempts():
            try:
                return action()
            except (XTunerError, ChangedObjectError):
                raise
            except Exception as e:  # of obstore: one class for most failures
                failure = _Failure.read(e)
                if failure.missing:
                    raise FileNotFoundError(2, "there is no such object", str(url)) from None
                if isinstance(e, OSError) and failure.status is None:  # of the local disk
                    raise
                waited = time.monotonic() - begin
                if not failure.temporary or number == self.attempts or waited > PATIENCE:
                    raise failure.explain(url, verb, number, waited) from None
                pause = min(FIRST_PAUSE * 2 ** (number - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            logger.warning(f"{url} cannot be {verb} now: {failure.reason}; attempt {number} of {self.attempts}")
            record_progress(f"{url}: attempt {number}")
            time.sleep(pause)
        raise AssertionError

    def _count_attempts(self) -> Iterator[int]:
        return iter(range(1, self.attempts + 1))


def _version(meta: Any) -> int:
    """56 bits of a hash of the ETag, without the mark of a weak one: it also is a valid time of a file, in ns."""
    tag = str(meta.get("e_tag") or meta.get("last_modified")).removeprefix("W/")
    return int.from_bytes(sha256(tag.encode()).digest()[:7], "big")


class _Failure(NamedTuple):
    status: int | None
    code: str  # of S3, in the body of its answer
    reason: str
    kind: str  # of the Python exception
    text: str

    @classmethod
    def read(cls, error: Exception) -> "_Failure":
        text = str(error).partition("\n\nDebug source:")[0]
        status = re.search(r"status code: (\d{3})", text)
        code = re.search(r"<Code>(\w{1,60})</Code>", text)
        number, name = int(status[1]) if status else None, code[1] if code else ""
        if number:
            reason = f"the server answered {number} {name}".rstrip()
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = "no connection" if "error sending request" in text else "the connection was cut or timed out"
        return cls(number, name, reason, type(error).__name__, text)

    @property
    def missing(self) -> bool:
        return self.status == 404 and self.code not in _WRONG_BUCKET

    @property
    def temporary(self) -> bool:
        if self.without_credentials:
            return False
        if self.status is None:
            return self.kind not in ("ValueError", "InvalidPathError")
        return self.status >= 500 or self.status in (408, 429) or self.code in _TEMPORARY

    @property
    def without_credentials(self) -> bool:
        """The machine has no role: its metadata service does not answer."""
        return "/latest/api/token" in self.text or "/latest/meta-data" in self.text

    def explain(self, url: Url, verb: str, attempts: int, waited: float) -> XTunerError:
        what = f"{url} cannot be {verb}"
        if self.without_credentials:
            return ConfigError(f"there are no credentials to access {url}", do=advise_on_credentials(url.scheme))
        if self.status in (401, 403) or self.kind in ("PermissionDeniedError", "UnauthenticatedError"):
            return ConfigError(f"{what}: {self.reason}", do=advise_on_credentials(url.scheme))
        if self.code in _WRONG_BUCKET or self.status == 301:
            return ConfigError(
                f"{what}: the bucket {url.bucket!r} does not exist there ({self.reason})",
                do=f"check its name; {advise_on_endpoint(url.scheme)}",
            )
        if self.temporary:
            return CheckpointError(
                f"{what}: {self.reason}; {attempts} attempts in {waited:.0f} s",
                do=f"run the same command again later; {advise_on_endpoint(url.scheme)}",
            )
        return CheckpointError(f"{what}: {self.reason}", where=str(url), do=advise_on_endpoint(url.scheme))
