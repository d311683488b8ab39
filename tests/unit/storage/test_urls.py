"""Which storage a root names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dcp_async.storage import LocalStorage, MemoryStorage, Storage, storage_at


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


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "hdfs", "https", "a+b.c-d"])
def test_a_scheme_that_nobody_serves_is_refused_with_those_that_are(scheme: str) -> None:
    with pytest.raises(ValueError, match=r"no storage serves .*://.*file:///absolute/path and memory://name"):
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
