"""A file on its way into a bucket: whose a buffer is, and what an upload leaves that does not end."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import AsyncIterable
from typing import Any

import obstore
import pytest

from dcp_async._names import manifest_file
from dcp_async.errors import StorageError
from dcp_async.storage import Retries, Transaction
from dcp_async.storage.object_store.bucket import Bucket
from dcp_async.storage.object_store.upload import part_bytes_for
from dcp_async.testing.saves import FIRST, NAME, check_whole, commit, file_of, uids_named_in
from tests.support.buckets import BUCKET, Fault, Proxy, Server, proxy_to

MIB = 1 << 20
PART = 5 * MIB
FILE = file_of(FIRST)


def content_of(nbytes: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in range(-(-nbytes // 4)))[:nbytes]


CONTENT = content_of(2 * PART + 1234)


async def begin(
    server: Server, prefix: str, nbytes: int | None = len(CONTENT), **options: Any
) -> Transaction:
    storage = server.storage(prefix, part_bytes=PART, **options)
    return await storage.begin(NAME, {FILE: nbytes}, uid=FIRST, replace=False)


def part(number: int) -> memoryview:
    return memoryview(bytearray(CONTENT[number * PART : (number + 1) * PART]))


async def put_all(transaction: Transaction, step: int = PART) -> None:
    for start in range(0, len(CONTENT), step):
        await transaction.put(FILE, start, memoryview(bytearray(CONTENT[start : start + step])))


async def put_and_seal(transaction: Transaction) -> None:
    await put_all(transaction)
    await transaction.seal(FILE)


def part_puts(proxy: Proxy) -> list[str]:
    return [line for line in proxy.seen if "partNumber=" in line]


# -- what arrives


@pytest.mark.parametrize(
    ("step", "nbytes"),
    [(3 * PART, len(CONTENT)), (3 * MIB, len(CONTENT)), (PART, None), (7 * MIB, None)],
    ids=["whole", "less than parts", "parts of an unknown length", "more than parts"],
)
async def test_a_file_of_many_parts_is_what_was_put(
    moto: Server, prefix: str, step: int, nbytes: int | None
) -> None:
    transaction = await begin(moto, prefix, nbytes)
    await put_all(transaction, step)
    await transaction.seal(FILE)
    await transaction.verify({FILE: len(CONTENT)})
    await commit(transaction, FIRST)
    await check_whole(moto.storage(prefix), NAME, FIRST, CONTENT)


async def test_parts_may_come_backwards_one_after_the_other(moto: Server, prefix: str) -> None:
    transaction = await begin(moto, prefix)
    for number in (2, 1, 0):
        slot = part(number)
        await transaction.put(FILE, number * PART, slot)
        slot[:] = bytes(len(slot))
    await transaction.seal(FILE)
    await commit(transaction, FIRST)
    await check_whole(moto.storage(prefix), NAME, FIRST, CONTENT)


async def test_a_file_that_fills_one_part_is_one_request(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        transaction = await begin(proxy.server, prefix, 3 * MIB)
        proxy.seen.clear()
        await transaction.put(FILE, 0, memoryview(CONTENT)[: 3 * MIB])
        await transaction.seal(FILE)
        assert len(proxy.seen) == 1
        await transaction.abort()


async def test_no_more_parts_are_on_their_way_than_are_allowed(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        gate = asyncio.Event()
        proxy.fault = lambda line: Fault("hold", until=gate) if "partNumber=" in line else None
        transaction = await begin(proxy.server, prefix, concurrency=1)
        puts = asyncio.gather(*(transaction.put(FILE, number * PART, part(number)) for number in range(3)))
        await proxy.until("partNumber=")
        assert len(part_puts(proxy)) == 1
        assert not puts.done()
        gate.set()
        await puts
        await transaction.abort()


async def test_pieces_that_are_copied_wait_while_the_network_does(
    moto: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, taken = asyncio.Event(), list[int]()

    async def upload(self: Bucket, key: str, parts: AsyncIterable[memoryview], **_: int) -> None:
        async for part in parts:
            taken.append(len(part))
            await gate.wait()

    monkeypatch.setattr(Bucket, "upload", upload)
    transaction = await begin(moto, prefix, 20 * PART)
    accepted = 0

    async def put_all_pieces() -> None:
        nonlocal accepted
        for start in range(0, 20 * PART, MIB):
            await transaction.put(FILE, start, memoryview(bytearray(MIB)))
            accepted += MIB

    putting = asyncio.ensure_future(put_all_pieces())
    for _ in range(1000):  # nothing here waits for anything but a turn of the loop
        await asyncio.sleep(0)
    assert not putting.done()
    assert accepted <= 4 * PART
    gate.set()
    await putting
    await transaction.seal(FILE)
    assert taken == [PART] * 20
    await transaction.abort()


# -- who owns the buffer


async def test_a_whole_part_belongs_to_the_upload_until_the_server_has_it(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        gate = asyncio.Event()
        proxy.fault = lambda line: Fault("hold", until=gate) if "partNumber=1&" in line else None
        transaction = await begin(proxy.server, prefix)
        slot = part(0)
        put = asyncio.ensure_future(transaction.put(FILE, 0, slot))
        await proxy.until("partNumber=")
        assert not put.done()
        # other parts need no turn of their own behind it
        await transaction.put(FILE, PART, part(1))
        assert not put.done()
        gate.set()
        await put
        slot[:] = bytes(len(slot))
        await transaction.put(FILE, 2 * PART, part(2))
        await transaction.seal(FILE)
        await commit(transaction, FIRST)
        await check_whole(moto.storage(prefix), NAME, FIRST, CONTENT)


async def test_a_cancelled_put_returns_the_buffer_and_leaves_no_upload(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        gate = asyncio.Event()
        proxy.fault = lambda line: Fault("hold", until=gate) if "partNumber=" in line else None
        transaction = await begin(proxy.server, prefix)
        slot = bytearray(part(0))
        put = asyncio.ensure_future(transaction.put(FILE, 0, memoryview(slot)))
        await proxy.until("partNumber=")
        put.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await put
        with pytest.raises(StorageError, match="its upload was stopped"):
            await transaction.put(FILE, PART, part(1))
        await transaction.abort()
    assert moto.open_uploads(prefix) == moto.keys(prefix) == []


# -- what is left


@pytest.mark.parametrize("parts", [0, 1, 2])
async def test_an_abort_in_the_middle_leaves_neither_object_nor_upload(
    moto: Server, prefix: str, parts: int
) -> None:
    transaction = await begin(moto, prefix)
    for number in range(parts):
        await transaction.put(FILE, number * PART, part(number))
    await transaction.abort()
    assert moto.open_uploads(prefix) == moto.keys(prefix) == []


async def test_an_abort_after_the_last_part_leaves_neither_object_nor_upload(
    moto: Server, prefix: str
) -> None:
    transaction = await begin(moto, prefix)
    await put_all(transaction)
    await transaction.seal(FILE)
    await transaction.abort()
    assert moto.open_uploads(prefix) == moto.keys(prefix) == []


@pytest.mark.parametrize(
    ("line", "status"),
    [("PUT .*partNumber=2&", 403), ("PUT .*partNumber=3&", 503), ("POST .*uploadId=", 503)],
)
async def test_a_request_that_fails_for_good_is_named_and_leaves_nothing(
    moto: Server, prefix: str, line: str, status: int
) -> None:
    async with proxy_to(moto) as proxy:
        transaction = await begin(proxy.server, prefix)
        proxy.fault = lambda first: Fault("status", status) if re.match(line, first) else None
        with pytest.raises(StorageError, match=rf"cannot write s3://.*{FILE}: .*{status}") as raised:
            await put_and_seal(transaction)
        assert raised.value.errno == (errno.EACCES if status == 403 else errno.EIO)
        assert "uploadId" not in str(raised.value)
        await transaction.abort()
    assert moto.open_uploads(prefix) == moto.keys(prefix) == []


async def test_a_server_that_does_not_answer_ends_the_save_in_time(
    moto: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_async.storage.object_store.upload._STOP_SECONDS", 0.1)
    async with proxy_to(moto) as proxy:
        transaction = await begin(
            proxy.server, prefix, request_timeout=0.3, retries=Retries(attempts=1, seconds=1.0)
        )
        never = asyncio.Event()
        proxy.fault = lambda line: Fault("hold", until=never) if "uploadId=" in line else None
        with pytest.raises(StorageError, match=rf"cannot write s3://.*{FILE}"):
            await put_and_seal(transaction)
        proxy.fault = lambda line: None
        await transaction.abort()
    assert moto.open_uploads(prefix) == moto.keys(prefix) == []


async def test_an_upload_that_could_not_be_aborted_is_with_the_transaction(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        transaction = await begin(proxy.server, prefix)
        proxy.fault = lambda line: Fault("status") if "uploadId=" in line and "PUT" not in line else None
        with pytest.raises(StorageError):
            await put_and_seal(transaction)
        assert len(moto.open_uploads(prefix)) == 1
        proxy.fault = lambda line: None
        await transaction.abort()
    assert moto.open_uploads(prefix) == moto.keys(prefix) == []


async def test_an_upload_that_a_killed_process_left_open_goes_with_the_sweep(
    moto: Server, prefix: str
) -> None:
    key = f"{prefix}/{NAME}/{FILE}"
    for of_whom in (key, f"{prefix}/{NAME}/somebody-elses"):
        moto.client().create_multipart_upload(Bucket=BUCKET, Key=of_whom)
    obstore.put(moto.store(), f"{prefix}/{NAME}/{manifest_file(FIRST)}", b"left behind")
    await moto.storage(prefix).sweep(named=uids_named_in)
    assert moto.keys(prefix) == []
    assert moto.open_uploads(prefix) == [f"{prefix}/{NAME}/somebody-elses"]


async def test_an_error_now_and_then_is_retried(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        turns = iter(range(10_000))
        kinds = (Fault("status", 503), Fault("reset"), Fault("status", 500), None, Fault("lost answer"), None)
        proxy.fault = lambda line: kinds[next(turns) % len(kinds)] if "partNumber=" in line else None
        transaction = await begin(proxy.server, prefix)
        await put_all(transaction)
        await transaction.seal(FILE)
        await commit(transaction, FIRST)
    await check_whole(moto.storage(prefix), NAME, FIRST, CONTENT)


# -- plans


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (None, PART),
        (0, PART),
        (10_000 * PART, PART),
        (10_000 * PART + 1, 2 * PART),
        (5 << 40, 128 * PART),
    ],
)
def test_parts_grow_so_that_a_file_has_ten_thousand_at_most(nbytes: int | None, expected: int) -> None:
    assert part_bytes_for(nbytes, PART) == expected
    assert (nbytes or 0) <= 10_000 * expected
