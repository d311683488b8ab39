"""How a bucket is reached: from a URL and a few options to obstore's store.

Enters: what a user gave. Leaves: a store. Invariant: obstore is imported when a bucket is named, not before,
and what it would ask the environment for, credentials say, it still asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

Credentials: TypeAlias = Callable[[], Any]
"""Gives credentials anew whenever they expire: a provider as obstore takes them, a coroutine function or a
plain one."""

_STORES = ("S3Store", "GCSStore", "AzureStore", "MemoryStore")
SCHEMES = ("s3", "gs", "az")
"""Schemes of the URLs that name a bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often a request that failed is made again: one that the server answered with 429 or 5xx, whose
    connection broke, or whose answer was cut short."""

    attempts: int = 10
    """Besides the first."""
    seconds: float = 120.0
    """From the first attempt on; later none begins. Below 300, since a signature is valid for that long."""
    first_pause: float = 0.1
    """Seconds before the second attempt; each later pause is up to twice as long, by a random factor, so that
    a thousand ranks do not come back at once."""
    longest_pause: float = 10.0
    """Seconds."""

    def __post_init__(self) -> None:
        if self.attempts < 0:
            raise ValueError(f"Retries(attempts=...) is at least 0, not {self.attempts}")
        for name in ("seconds", "first_pause", "longest_pause"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Retries({name}=...) is more than 0, not {getattr(self, name)}")


def _retry_config(retries: Retries) -> RetryConfig:
    """What obstore calls it."""
    return {
        "max_retries": retries.attempts,
        "retry_timeout": timedelta(seconds=retries.seconds),
        "backoff": {
            "init_backoff": timedelta(seconds=retries.first_pause),
            "max_backoff": timedelta(seconds=retries.longest_pause),
            "base": 2,
        },
    }


def _require_obstore(url: str) -> None:
    """Raises: ModuleNotFoundError that says what to install."""
    try:
        import obstore  # noqa: F401  # only whether it is there
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"root={url!r}: buckets need obstore, which is not installed: "
            "pip install 'dcp-async[object-stores]'",
            name="obstore",
        ) from error


_ENDPOINT_KEYS = {"endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url"}


def _is_plain(endpoint: str | None) -> bool:
    """Whether requests may go without TLS. obstore does not tell what it has read in the environment."""
    named = [value for name, value in os.environ.items() if name.upper().startswith("AWS_ENDPOINT")]
    return any(url.lower().startswith("http:") for url in ([endpoint] if endpoint else named))


def _endpoint_in(settings: Mapping[str, Any]) -> str | None:
    """The endpoint among ``settings``, under whichever of obstore's names for it."""
    named = [value for key, value in settings.items() if key.lower() in _ENDPOINT_KEYS]
    return str(named[0]) if named else None


def resolve(
    url_or_store: str | ObjectStore,
    *,
    endpoint: str | None,
    credentials: Credentials | None,
    config: Mapping[str, Any] | None,
    retries: Retries,
    request_timeout: float,
) -> tuple[str, ObjectStore]:
    """What messages call a store, and the store. Raises: TypeError; ValueError; ModuleNotFoundError."""
    if isinstance(url_or_store, str):
        url = url_or_store.rstrip("/")
        return url, _make_store(url, endpoint, credentials, config, retries, request_timeout)
    _check_store(url_or_store)
    given = {"endpoint": endpoint, "credentials": credentials, "config": config}
    if superfluous := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(superfluous)}: make the store that is given with them")
    return repr(url_or_store), url_or_store


def _check_store(store: object) -> None:
    """Refuse a store that checkpoints are not safe in. Raises: TypeError."""
    # by name, as obstore may not even be installed here
    if type(store).__name__ not in _STORES:
        raise TypeError(
            f"root={store!r} must be a URL or a store of obstore's, one of {', '.join(_STORES)}. A directory "
            "is a path or a LocalStorage of ours: obstore's syncs nothing to the disk"
        )


def _checked_scheme(url: str, endpoint: str | None, request_timeout: float) -> str:
    """The scheme of ``url``. Raises: ValueError for what no store can be made of."""
    if request_timeout <= 0:
        raise ValueError(f"ObjectStorage(request_timeout=...) is more than 0, not {request_timeout}")
    scheme, bucket = urlsplit(url).scheme.lower(), urlsplit(url).netloc
    if "@" in bucket:  # said without the URL, which is in each message and each repr otherwise
        raise ValueError(
            f"a root {scheme}://...@... has credentials in it, which no bucket's URL has: pass them as "
            "ObjectStorage(config=...) or (credentials=...), or where the cloud's own tools look for them"
        )
    if scheme not in SCHEMES or not bucket or "?" in url or "#" in url:
        raise ValueError(
            f"root={url!r} names no bucket; write s3://bucket/run1, gs://bucket/run1, az://container/run1"
        )
    if endpoint is not None and scheme == "gs":
        raise ValueError(
            "Google's client takes no endpoint=...; its service account's file names one (gcs_base_url)"
        )
    return scheme


def _make_store(
    url: str,
    endpoint: str | None,
    credentials: Credentials | None,
    config: Mapping[str, Any] | None,
    retries: Retries,
    request_timeout: float,
) -> ObjectStore:
    """The store of ``url``. Raises: ValueError; ModuleNotFoundError."""
    scheme = _checked_scheme(url, endpoint, request_timeout)
    _require_obstore(url)
    import obstore.exceptions
    from obstore.store import from_url

    settings = dict(config or {})
    if endpoint is not None:
        settings["endpoint"] = endpoint
    if scheme == "s3" and not _is_plain(endpoint or _endpoint_in(settings)):
        # TLS protects the body on its way already; to sign it costs a hash that is slower than many networks
        settings.setdefault("unsigned_payload", True)
    client: ClientConfig = {
        # of servers that somebody named by http://; a cloud's own are never asked so
        "allow_http": True,
        "timeout": timedelta(seconds=request_timeout),
        "connect_timeout": timedelta(seconds=min(10.0, request_timeout)),
    }
    made: Any = from_url  # its overloads know one kind of configuration each
    try:
        store: ObjectStore = made(
            url,
            config=settings or None,
            client_options=client,
            retry_config=_retry_config(retries),
            credential_provider=credentials,
        )
    except (obstore.exceptions.BaseError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"root={url!r}: the store can't be made of these options: {reason}") from error
    return store
