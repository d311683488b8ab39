"""Which storage a root names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dcp_async.storage import (
    LocalStorage,
    MemoryStorage,
    ObjectStorage,
    Storage,
    root_and_name,
    storage_at,
)


def _at(root: str | os.PathLike[str]) -> Storage:
    return storage_at(root, io_concurrency=1, timeout=1.0, lease_max_age=1.0, follow_links=False)


@pytest.mark.parametrize(
    "root", ["checkpoints/run1", "/run1", "memory", "memory:run1", "./s3://bucket", "a:/b", "1://b"]
)
def test_a_plain_string_is_a_path(root: str) -> None:
    storage = _at(root)
    assert isinstance(storage, LocalStorage)
    assert storage.root == Path(root).absolute()


def test_a_path_is_never_a_url() -> None:
    storage = _at(Path("memory://run1"))
    assert isinstance(storage, LocalStorage)
    assert storage.root == Path("memory:/run1").absolute()


@pytest.mark.parametrize("path", ["/run1", "/with blank", "/100%", "/a?b", "/a#b", "/ä", "/trailing/"])
def test_a_file_url_names_the_path_that_as_uri_was_asked_for(path: str) -> None:
    storage = _at(Path(path).as_uri())
    assert isinstance(storage, LocalStorage)
    assert storage.root == Path(path)


def test_a_file_url_may_name_this_host_and_its_scheme_in_capitals() -> None:
    storage = _at("FILE://localhost/run1")
    assert isinstance(storage, LocalStorage)
    assert storage.root == Path("/run1")


@pytest.mark.parametrize("name", ["run1", "team/run1", "test_x[a-1]"])
def test_a_memory_url_names_memory(name: str) -> None:
    storage = _at(f"memory://{name}")
    assert isinstance(storage, MemoryStorage)
    assert repr(storage) == repr(MemoryStorage(name))


@pytest.mark.parametrize("url", ["s3://bucket/run1", "S3://bucket", "az://container/a/b/"])
def test_a_url_of_a_bucket_names_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert repr(_at(url)) == f"ObjectStorage({url.rstrip('/')!r})"


@pytest.mark.parametrize("url", ["s3://", "s3:///run1", "gs://bucket?generation=1", "az://container#x"])
def test_a_url_without_a_bucket_or_with_more_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"names no bucket; write s3://bucket/run1"):
        _at(url)


def test_a_bucket_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dcp-async\[object-stores\]'"):
        _at("s3://bucket/run1")


@pytest.mark.parametrize("scheme", ["hdfs", "https", "a+b.c-d", "s3a"])
def test_a_scheme_that_nobody_serves_is_refused_with_those_that_are(scheme: str) -> None:
    with pytest.raises(ValueError, match=r"no storage serves .*://.*s3://bucket/run1.* and memory://name"):
        _at(f"{scheme}://bucket/run1")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file://run1/a", "names the host 'run1'"),
        ("file://", "has no path"),
        ("file://localhost", "has no path"),
        ("file:///a?b", "is written %3F"),
        ("file:///a#b", "is written %3F"),
        ("file:///a%00b", "is no path"),
        ("memory://", "can't be a name of memory"),
        ("memory:///run1", "can't be a name of memory"),
        ("memory://run1?size=1", "can't be a name of memory"),
    ],
)
def test_a_url_that_names_nothing_says_why(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        _at(url)


@pytest.mark.parametrize("key", ["endpoint", "endpoint_url", "AWS_ENDPOINT_URL"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_payload_without_tls_is_signed_however_the_endpoint_is_named(
    key: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr("obstore.store.from_url", lambda url, **options: made.update(options))
    ObjectStorage("s3://bucket/run1", config={key: f"{scheme}://127.0.0.1:9"})
    assert made["config"].get("unsigned_payload", False) is (scheme == "https")


@pytest.mark.parametrize(
    ("url", "root", "name"),
    [
        ("s3://bucket/run1/step-00000001/", "s3://bucket/run1", "step-00000001"),
        ("memory://run1/a%20b", "memory://run1", "a%20b"),
        ("file:///a/b%20c", "file:///a", "b c"),
        ("file:///a", "file:///", "a"),
    ],
)
def test_a_checkpoint_has_the_url_of_its_root_and_a_name(url: str, root: str, name: str) -> None:
    assert root_and_name(url) == (root, name)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://", "gs:///a", "memory://run1/", "file://"])
def test_the_url_of_a_root_alone_names_no_checkpoint(url: str) -> None:
    with pytest.raises(ValueError, match="names no checkpoint"):
        root_and_name(url)
