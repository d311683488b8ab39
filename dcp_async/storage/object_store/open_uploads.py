"""Multipart uploads that nobody ends any more, which obstore can neither list nor abort.

Enters: a bucket, a checkpoint's name, the uid of a save that is dead. Leaves: none of its uploads. Invariant:
an upload of another save, and of somebody else's, stays. S3 alone has such uploads for ever, and botocore
speaks to it where it is installed; where it is not, a lifecycle rule of the bucket does the same days later.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ..._concurrency import BlockingThreads, run_blocking

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_SECONDS = 120.0


async def abort_open_uploads(
    store: ObjectStore, name: str, uid: str, credentials: Callable[[], Any] | None
) -> None:
    """End what the save ``uid`` of ``name`` left open. Failing at it loses nothing but the room it takes."""
    if type(store).__name__ != "S3Store":
        return
    try:
        count = await _ask(_abort, store, credentials, name, uid)
    except ModuleNotFoundError:
        logger.debug("botocore is not installed: uploads that %s left open are for a lifecycle rule", uid)
    except Exception as error:  # of botocore's many none is worth a save
        logger.warning("could not look for uploads that the save %s of %s left open: %s", uid, name, error)
    else:
        if count:
            logger.info("aborted %d uploads that the save %s of %s left open", count, uid, name)


async def ends_open_uploads(store: ObjectStore, credentials: Callable[[], Any] | None) -> bool:
    """Whether a lifecycle rule of the bucket ends uploads that were left open. Raises what botocore does, and
    ModuleNotFoundError without it."""
    return await _ask(_has_rule, store, credentials)


async def _ask(
    fn: Callable[Concatenate[Any, Mapping[str, Any], P], T],
    store: ObjectStore,
    credentials: Callable[[], Any] | None,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """``fn`` of a client of botocore's and of the store's configuration, in a thread."""
    given = credentials() if credentials is not None else None
    keys: Mapping[str, Any] = await given if inspect.isawaitable(given) else given or {}
    config = {**store.config, "prefix": store.prefix, **keys}  # type: ignore[union-attr]  # an S3Store has both

    def ask() -> T:
        return fn(_client(config), config, *args, **kwargs)

    # a thread for this one call, which waits for a server: only a save that died or was cut off asks for it
    threads = BlockingThreads("dcp_async-uploads", 1)
    try:
        return await run_blocking(threads, _SECONDS, ask)
    finally:
        threads.shutdown()


def _abort(client: Any, config: Mapping[str, Any], name: str, uid: str) -> int:
    bucket, root = config["bucket"], f"{config['prefix']}/" if config["prefix"] else ""
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{root}{name}/")
    uploads = [upload for page in pages for upload in page.get("Uploads", []) if uid in upload["Key"]]
    for upload in uploads:
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    return len(uploads)


def _has_rule(client: Any, config: Mapping[str, Any]) -> bool:
    import botocore.exceptions

    try:
        rules = client.get_bucket_lifecycle_configuration(Bucket=config["bucket"])["Rules"]
    except botocore.exceptions.ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchLifecycleConfiguration":
            return False
        raise
    return any(rule["Status"] == "Enabled" and "AbortIncompleteMultipartUpload" in rule for rule in rules)


def _client(config: Mapping[str, Any]) -> Any:
    """A client of botocore's for the server of ``config``; what that does not say, botocore looks for where
    obstore does."""
    import botocore.config
    import botocore.session

    # as obstore addresses it, which asks a server by path unless told otherwise
    style = "virtual" if str(config.get("virtual_hosted_style_request", "")).lower() == "true" else "path"
    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=config.get("endpoint"),
        region_name=config.get("region"),
        aws_access_key_id=config.get("access_key_id"),
        aws_secret_access_key=config.get("secret_access_key"),
        aws_session_token=config.get("token") or config.get("session_token"),
        config=botocore.config.Config(
            s3={"addressing_style": style},
            connect_timeout=10,
            read_timeout=30,
            retries={"total_max_attempts": 2},
        ),
    )
