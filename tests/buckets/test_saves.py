"""Saves to a bucket as a whole: who wins, what is published, what is left, what a sweep takes."""

from __future__ import annotations

import asyncio
import errno
import os

import obstore
import pytest
from obstore.store import LocalStore, MemoryStore, S3Store

from dcp_async._names import lease_file
from dcp_async.errors import StorageError
from dcp_async.storage import ObjectStorage, Retries, StoredCheckpoint
from dcp_async.storage.object_store.bucket import Bucket
from dcp_async.testing.saves import (
    CONTENT,
    FIRST,
    NAME,
    OTHER,
    SECOND,
    check_absent,
    check_whole,
    commit,
    committed,
    file_of,
    manifest_of,
    metadata_of,
    save,
    uids_named_in,
    write,
)
from tests.support.buckets import BUCKET, KEYS, PATIENCE, QUICK, Fault, Server, proxy_to


def is_publication(line: str) -> bool:
    return line.startswith("PUT ") and "/.metadata " in line


# -- publishing


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="credentials") as raised:
        ObjectStorage("s3://AKIA123:hidden@bucket/run1")
    assert "AKIA123" not in str(raised.value)
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize("kind", ["lost answer", "reset", "status"])
async def test_a_publication_whose_answer_is_lost_is_recognised_as_ours(
    moto: Server, prefix: str, kind: str
) -> None:
    async with proxy_to(moto) as proxy:
        faults = iter([Fault(kind)])  # type: ignore[arg-type]  # one of its kinds
        proxy.fault = lambda line: next(faults, None) if is_publication(line) else None
        await save(proxy.server.storage(prefix), NAME, FIRST)
    await check_whole(moto.storage(prefix), NAME, FIRST)


async def test_a_publication_that_nobody_knows_of_leaves_everything_to_a_later_sweep(
    moto: Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy_to(moto) as proxy:
        storage = proxy.server.storage(prefix, retries=Retries(attempts=0, seconds=1.0))
        transaction = await write(storage, NAME, FIRST)
        proxy.fault = lambda line: Fault("status", 503) if "/.metadata" in line else None
        with pytest.raises(StorageError, match="503"):
            await transaction.commit(metadata_of(FIRST), manifest_of(FIRST), replace=True)
        proxy.fault = lambda line: None
        await transaction.abort()
        assert "whether it was published is not known" in caplog.text
        assert any(key.endswith(file_of(FIRST)) for key in moto.keys(prefix))
    await moto.storage(prefix, lease_max_age=0.0).sweep(named=uids_named_in)
    while moto.keys(prefix):  # the server's clock has seconds: an age of none is not more than none
        await moto.storage(prefix, lease_max_age=0.0).sweep(named=uids_named_in)


async def test_a_name_that_was_taken_meanwhile_is_refused_and_the_loser_goes(
    seaweed: Server, prefix: str
) -> None:
    storage = seaweed.storage(prefix)
    loser = await write(storage, NAME, SECOND)
    await save(storage, NAME, FIRST)
    with pytest.raises(FileExistsError):
        await commit(loser, SECOND)
    await loser.abort()
    await check_whole(storage, NAME, FIRST)
    assert not [key for key in seaweed.keys(prefix) if SECOND in key]


async def test_a_server_without_preconditions_is_told_of_once(
    moto: Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy_to(moto) as proxy:
        proxy.strip = b"if-none-match:"
        storage = proxy.server.storage(prefix)
        await save(storage, NAME, FIRST)
        assert caplog.text.count("the server ignores If-None-Match") == 1
        late = await write(storage, OTHER, FIRST)
        await save(storage, OTHER, SECOND)
        # what it can't do at once is looked at before
        with pytest.raises(FileExistsError):
            await commit(late, FIRST)
        await late.abort()
        assert caplog.text.count("the server ignores If-None-Match") == 1
    await check_whole(moto.storage(prefix), OTHER, SECOND)


async def test_a_good_server_is_asked_for_preconditions_once(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        storage = proxy.server.storage(prefix)
        for name in (NAME, OTHER):
            await save(storage, name, FIRST)
        assert len([line for line in proxy.seen if lease_file(FIRST) in line and line.startswith("PUT")]) == 3


async def test_a_checkpoint_that_was_replaced_within_a_second_is_told_apart(
    moto: Server, prefix: str
) -> None:
    storage = moto.storage(prefix)
    listed: list[StoredCheckpoint] = []
    for uid in (FIRST, SECOND):
        await save(storage, NAME, uid, replace=True)
        listed.append(*await storage.list())
    assert listed[0].version != listed[1].version


# -- removing


async def test_what_others_put_beside_a_checkpoint_stays_when_it_is_removed() -> None:
    store = MemoryStore()
    storage = ObjectStorage(store)
    await save(storage, NAME, FIRST)
    others = ["README", "eval/results.json", "model.safetensors"]
    for name in [
        *others,
        "__0_0.distcp",
        "__0.metadata",
        "__1.metadata",
    ]:  # the last three are of stock's kinds
        obstore.put(store, f"{NAME}/{name}", b"")
    await storage.remove(NAME)
    assert sorted(meta["path"] for page in obstore.list(store) for meta in page) == [
        f"{NAME}/{name}" for name in others
    ]


async def test_one_that_is_gone_keeps_no_other_from_being_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, delete = MemoryStore(), obstore.delete_async

    async def delete_as_google_does(store: MemoryStore, keys: str | list[str]) -> None:
        for key in [keys] if isinstance(keys, str) else keys:
            await obstore.head_async(store, key)  # what is gone is an error there, and ends the batch
            await delete(store, key)

    monkeypatch.setattr(obstore, "delete_async", delete_as_google_does)
    obstore.put(store, "there", b"")
    await Bucket(store, "memory://", QUICK).delete(["gone", "there", "gone too"])
    assert not [meta for page in obstore.list(store) for meta in page]


# -- leases and sweeps


async def test_a_lease_is_renewed_while_its_save_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    put, seen, keys = Bucket.put, asyncio.Event(), list[str]()

    async def counted(self: Bucket, key: str, content: bytes | memoryview) -> None:
        await put(self, key, content)
        keys.append(key)
        if keys.count(f"{NAME}/{lease_file(FIRST)}") == 2:
            seen.set()

    monkeypatch.setattr(Bucket, "put", counted)
    storage = ObjectStorage(store, lease_max_age=0.05)
    transaction = await write(storage, NAME, FIRST)
    key = f"{NAME}/{lease_file(FIRST)}"
    first = obstore.head(store, key)["last_modified"]
    await asyncio.wait_for(seen.wait(), PATIENCE)
    assert obstore.head(store, key)["last_modified"] > first
    await commit(transaction, FIRST)
    with pytest.raises(FileNotFoundError):
        obstore.head(store, key)


async def test_what_a_killed_process_left_goes_once_its_lease_is_old() -> None:
    store = MemoryStore()
    dead = await write(ObjectStorage(store), NAME, FIRST)  # its lease is renewed after minutes
    await save(ObjectStorage(store), OTHER, SECOND)
    young, old = ObjectStorage(store), ObjectStorage(store, lease_max_age=0.0)
    await young.sweep(named=uids_named_in)
    assert NAME in {stored.name for stored in await young.list()}
    await old.sweep(named=uids_named_in)
    assert [stored.name for stored in await old.list()] == [OTHER]
    await check_whole(old, OTHER, SECOND)
    # the save was not dead after all: it must not publish what is gone
    with pytest.raises(StorageError, match="taken for dead") as raised:
        await dead.verify({file_of(FIRST): len(CONTENT)})
    assert raised.value.errno == errno.ESTALE
    await dead.abort()
    await check_absent(old, NAME)


async def test_a_lease_that_a_killed_process_left_beside_its_checkpoint_goes(
    moto: Server, prefix: str
) -> None:
    storage = moto.storage(prefix)
    await save(storage, NAME, FIRST)
    key = f"{prefix}/{NAME}/{lease_file(FIRST)}"
    obstore.put(moto.store(), key, b"")
    while key in moto.keys(prefix):
        await moto.storage(prefix, lease_max_age=0.0).sweep(named=uids_named_in)
    await check_whole(storage, NAME, FIRST)


async def test_a_save_in_the_steady_state_lists_nothing(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        storage = proxy.server.storage(prefix)
        await save(storage, NAME, FIRST)
        await storage.sweep(named=uids_named_in)
        proxy.seen.clear()
        await save(storage, OTHER, SECOND)
        await storage.sweep(named=uids_named_in)
        assert [line for line in proxy.seen if "list-type=2" in line] == []
        # lease, file, manifest, .metadata; looks at the name, the file and the lease; the lease's removal
        assert len([line for line in proxy.seen if line.startswith("PUT ")]) == 4
        assert len(proxy.seen) == 11


async def test_a_rank_that_sees_no_lease_says_so(
    moto: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_async.storage.object_store.lease._VISIBLE_SECONDS", 0.0)
    with pytest.raises(StorageError, match=r"made it on host first: the ranks have different roots"):
        await moto.storage(prefix).begin(NAME, {}, uid=FIRST, replace=False, led_from="first")


async def test_the_files_of_ranks_that_died_go_with_the_leading_one(moto: Server, prefix: str) -> None:
    storage = moto.storage(prefix)
    leading = await storage.begin(NAME, {}, uid=FIRST, replace=False)
    other = await storage.begin(NAME, {file_of(FIRST): 4}, uid=FIRST, replace=False, led_from="here")
    await other.put(file_of(FIRST), 0, memoryview(b"abcd"))
    await other.seal(file_of(FIRST))
    other.hand_over()
    await other.abort()
    assert len(moto.keys(prefix)) == 2
    await leading.abort()
    assert moto.keys(prefix) == []


# -- roots


async def test_a_bucket_that_is_not_there_is_told_when_it_is_opened(seaweed: Server) -> None:
    storage = ObjectStorage("s3://nowhere/run", endpoint=seaweed.endpoint, config=KEYS, retries=QUICK)
    with pytest.raises(StorageError, match=r"cannot list s3://nowhere/run"):
        await storage.connect()


async def test_a_wrong_key_is_told_when_it_is_opened(seaweed: Server, prefix: str) -> None:
    storage = seaweed.storage(prefix, config={**KEYS, "secret_access_key": "another"})
    with pytest.raises(StorageError, match=r"cannot list s3://") as raised:
        await storage.connect()
    assert raised.value.errno == errno.EACCES


async def test_a_provider_of_credentials_is_asked(seaweed: Server, prefix: str) -> None:
    asked = []

    def give() -> dict[str, object]:
        asked.append(1)
        keys = {"access_key_id": KEYS["access_key_id"], "secret_access_key": KEYS["secret_access_key"]}
        return {**keys, "token": None, "expires_at": None}

    storage = seaweed.storage(prefix, config={"region": "us-east-1"}, credentials=give)
    await save(storage, NAME, FIRST)
    assert asked
    assert await committed(storage) == {NAME}


async def test_a_store_of_obstores_is_taken_as_it_is(seaweed: Server, prefix: str) -> None:
    store = S3Store(
        BUCKET, prefix=prefix, endpoint=seaweed.endpoint, client_options={"allow_http": True}, config=KEYS
    )
    await save(ObjectStorage(store), NAME, FIRST)
    await check_whole(seaweed.storage(prefix), NAME, FIRST)


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda: ObjectStorage(LocalStore()), TypeError, "syncs nothing to the disk"),
        (lambda: ObjectStorage(17), TypeError, "must be a URL or a store"),  # type: ignore[arg-type]  # on purpose
        (lambda: ObjectStorage(MemoryStore(), endpoint="http://x"), ValueError, "endpoint: make the store"),
        (lambda: ObjectStorage(MemoryStore(), concurrency=0), ValueError, "at least 1"),
        (lambda: ObjectStorage(MemoryStore(), part_bytes=1 << 20), ValueError, "at least 5242880"),
        (lambda: ObjectStorage("s3://bucket", request_timeout=0), ValueError, "more than 0"),
        (
            lambda: ObjectStorage("s3://bucket", config={"colour": "red"}),
            ValueError,
            "can't be made of these",
        ),
        (lambda: ObjectStorage("gs://bucket", endpoint="http://x"), ValueError, "takes no endpoint"),
        (lambda: ObjectStorage("/a/path"), ValueError, "names no bucket"),
        (lambda: Retries(attempts=-1), ValueError, "at least 0"),
    ],
)
def test_options_that_make_no_storage_are_refused(make: object, error: type[Exception], why: str) -> None:
    assert callable(make)
    with pytest.raises(error, match=why):
        make()


# -- what a doctor finds


async def levels_of(storage: ObjectStorage) -> dict[str, str]:
    return {finding.about: finding.level for finding in await storage.check()}


async def test_a_good_bucket_lacks_a_rule_until_it_has_one(moto: Server, prefix: str) -> None:
    good = dict.fromkeys(("list", "write", "conditions", "uploads", "read", "round trip", "remove"), "good")
    assert await levels_of(moto.storage(prefix)) == {**good, "rule": "warning"}
    rule = {
        "ID": "open uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 3},
    }
    moto.client().put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration={"Rules": [rule]})
    try:
        assert await levels_of(moto.storage(prefix)) == {**good, "rule": "good"}
    finally:
        moto.client().delete_bucket_lifecycle(Bucket=BUCKET)
    assert moto.keys(prefix) == []


@pytest.mark.parametrize(("refused", "about"), [("PUT ", "write"), ("list-type", "list"), ("GET /", "read")])
async def test_a_right_that_is_missing_is_said(moto: Server, prefix: str, refused: str, about: str) -> None:
    async with proxy_to(moto) as proxy:
        last_of_path = ".check-" if about == "read" else ""
        proxy.fault = lambda line: Fault("status", 403) if refused in line and last_of_path in line else None
        last = (await proxy.server.storage(prefix).check())[-1]
        assert (last.about, last.level) == (about, "error")
        assert "the rights of these credentials" in last.text
    assert moto.keys(prefix) == []


async def test_a_server_without_conditions_is_said(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        proxy.strip = b"if-none-match:"
        assert (await levels_of(proxy.server.storage(prefix)))["conditions"] == "warning"


def test_a_forked_child_gets_an_error_and_does_not_hang() -> None:
    storage = ObjectStorage(MemoryStore())
    asyncio.run(storage.connect())
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(storage.connect())
        except StorageError as error:
            os._exit(0 if error.errno == errno.EPERM else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
