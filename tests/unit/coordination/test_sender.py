"""What goes out through a sender, with a channel that keeps what it was given."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any, cast

from dcp_async.coordination.failures import RemoteError
from dcp_async.coordination.messages import Failed, to_plain
from dcp_async.coordination.sender import Sender
from dcp_async.coordination.store_channel import StoreChannel


class KeptChannel:
    """Sends nothing."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def send(self, box: str, message: object) -> None:
        """The place of StoreChannel.send."""

    def post_with(self, fn: Callable[..., None], *args: Any) -> concurrent.futures.Future[None]:
        assert fn == self.send
        self.sent.append((args[0], args[1]))
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None)
        return done


async def test_what_many_ranks_are_told_alike_is_made_plain_once() -> None:
    channel = KeptChannel()
    sender = Sender(
        channel=cast(StoreChannel, channel),
        nonce="n",
        rank=0,
        released=asyncio.get_running_loop().create_future(),
        hear=lambda message: None,
    )
    error = RemoteError(phase="write", type_name="OSError", message="disk full")
    first, second = (Failed(uid=uid, failures={1: error}) for uid in ("a", "b"))
    for message in (first, second):
        for rank in (1, 2):
            sender.send_out(rank, message)
    boxes, sent = zip(*channel.sent, strict=True)
    assert boxes == ("n/out/1", "n/out/2") * 2
    assert sent == (to_plain(first), to_plain(first), to_plain(second), to_plain(second))
    assert sent[0] is sent[1]
    assert sent[2] is sent[3]
