"""Whether a bucket is fit for checkpoints, found by trying.

Enters: a bucket. Leaves: findings in words, each with what to do. Invariant: what was written to find out is
removed again, and no checkpoint is touched.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ...errors import StorageError
from .bucket import Bucket
from .upload import LEAST_PART_BYTES

About: TypeAlias = Literal["list", "write", "conditions", "uploads", "read", "remove", "rule", "round trip"]

_LOOKS = 9
_SLOW_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found of a bucket."""

    level: Literal["good", "warning", "error"]
    """By an error saves or loads fail; a warning costs room, time, or one of two jobs its checkpoint."""
    about: About
    text: str
    """A sentence, and what to do."""


async def check_bucket(bucket: Bucket) -> list[Finding]:
    """What is wrong with ``bucket`` and what is not; ends at the first error of those that others need."""
    key = f".check-{secrets.token_hex(8)}"
    findings: list[Finding] = []
    try:
        await bucket.names()
        findings.append(Finding(level="good", about="list", text="the bucket is there and may be listed"))
        await bucket.put(key, b"0")
        findings.append(Finding(level="good", about="write", text="objects may be written"))
        findings.append(await _conditions(bucket, key))
        findings.append(await _uploads(bucket, key))
        findings.append(await _read(bucket, key))
        findings.append(await _round_trip(bucket, key))
        findings.append(await _rule(bucket))
        await bucket.delete([key])
        removed = await bucket.head(key) is None
        findings.append(
            Finding(level="good", about="remove", text="objects may be removed")
            if removed
            else Finding(level="error", about="remove", text="what was removed is still there")
        )
    except StorageError as error:
        findings.append(_failed(error))
        with contextlib.suppress(StorageError):  # it may be what fails
            await bucket.delete([key])
    return findings


# by the verb of a request that failed; the rest write
_ABOUT: dict[str, About] = {"list": "list", "read": "read", "remove": "remove"}


def _failed(error: StorageError) -> Finding:
    rights = error.errno == errno.EACCES
    where = "the rights of these credentials" if rights else "the URL, the endpoint and the region"
    about = _ABOUT.get(error.verb, "write")
    return Finding(level="error", about=about, text=f"{error}; look at {where}")


async def _conditions(bucket: Bucket, key: str) -> Finding:
    # the key is taken by now: a server that heeds the condition refuses
    if not await bucket.create(key, b"1"):
        return Finding(level="good", about="conditions", text="of two writers of one fresh name one wins")
    return Finding(
        level="warning",
        about="conditions",
        text="the server ignores If-None-Match: of two saves of one fresh name that commit at the same "
        "moment the second replaces the first. Let one job at a time save under a root",
    )


async def _uploads(bucket: Bucket, key: str) -> Finding:
    async def parts() -> AsyncIterator[memoryview]:
        # a whole part and a last one: of all others a server asks a least length
        yield memoryview(bytes(LEAST_PART_BYTES))
        yield memoryview(b"end")

    await bucket.upload(key, parts(), part_bytes=LEAST_PART_BYTES, at_once=1)
    return Finding(level="good", about="uploads", text="multipart uploads work")


async def _read(bucket: Bucket, key: str) -> Finding:
    if bytes(await bucket.get_range(key, LEAST_PART_BYTES, LEAST_PART_BYTES + 3)) == b"end":
        return Finding(level="good", about="read", text="ranges of objects may be read")
    return Finding(level="error", about="read", text="a range of an object is not what was written there")


async def _round_trip(bucket: Bucket, key: str) -> Finding:
    seconds = []
    for _ in range(_LOOKS):
        start = time.perf_counter()
        await bucket.head(key)
        seconds.append(time.perf_counter() - start)
    median, longest = statistics.median(seconds), max(seconds)
    text = f"a look at an object takes {1000 * median:.0f} ms, of {_LOOKS} at most {1000 * longest:.0f} ms"
    if median <= _SLOW_SECONDS:
        return Finding(level="good", about="round trip", text=text)
    return Finding(level="warning", about="round trip", text=f"{text}; is the bucket in another region?")


async def _rule(bucket: Bucket) -> Finding:
    """Whether uploads that a killed process leaves are ended."""
    try:
        if await bucket.ends_open_uploads():
            return Finding(level="good", about="rule", text="uploads that nobody ends are removed")
    except ModuleNotFoundError:
        text = (
            "whether a lifecycle rule ends open uploads can be seen with botocore alone: pip install botocore"
        )
        return Finding(level="warning", about="rule", text=text)
    except Exception as error:  # of botocore's many: the right to look at rules is rarely given
        return Finding(
            level="warning", about="rule", text=f"whether a lifecycle rule ends open uploads: {error}"
        )
    return Finding(
        level="warning",
        about="rule",
        text="no lifecycle rule ends multipart uploads that a killed process leaves open, which cost room; "
        "set AbortIncompleteMultipartUpload",
    )
