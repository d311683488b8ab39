"""Servers of buckets for the tests, on loopback: a real one, one in this process, and a proxy that does
wrong.

Out: options for an `ObjectStorage`, and what a server holds, as its own client tells it. Each is ended by
whoever made it; a SeaweedFS by SIGKILL, since it takes half a minute to end itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import obstore
from obstore.store import S3Store

from dcp_async.storage import ObjectStorage, Retries

if TYPE_CHECKING:
    from obstore.store import S3Config

BUCKET = "checkpoints"
KEYS: S3Config = {"access_key_id": "AK", "secret_access_key": "SECRETKEY", "region": "us-east-1"}
PATIENCE = 60.0
"""Seconds for a server to come up; far above what it needs."""
QUICK = Retries(attempts=4, seconds=20.0, first_pause=0.01, longest_pause=0.1)


@dataclass(frozen=True)
class Server:
    """Where a bucket is served."""

    endpoint: str

    def storage(self, prefix: str, **options: Any) -> ObjectStorage:
        return ObjectStorage(
            f"s3://{BUCKET}/{prefix.strip('/')}",
            **{"endpoint": self.endpoint, "config": KEYS, "retries": QUICK, **options},
        )

    def store(self) -> S3Store:
        return S3Store(BUCKET, endpoint=self.endpoint, client_options={"allow_http": True}, config=KEYS)

    def keys(self, prefix: str) -> list[str]:
        """All objects under ``prefix``, as the server lists them."""
        listed = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix.strip("/") + "/")
        return [entry["Key"] for entry in listed.get("Contents", [])]

    def open_uploads(self, prefix: str) -> list[str]:
        """Keys of multipart uploads that nobody has ended."""
        listed = self.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix.strip("/") + "/")
        return [upload["Key"] for upload in listed.get("Uploads", [])]

    def client(self) -> Any:
        """A client that is not obstore's."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEYS["access_key_id"],
            aws_secret_access_key=KEYS["secret_access_key"],
            region_name=KEYS["region"],
            config=Config(s3={"addressing_style": "path"}),
        )


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has at the moment, nor those 10,000 above, where SeaweedFS speaks to itself."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if port + 10_000 < 65_536:
                ports.append(port)
    return ports


class Seaweed:
    """A SeaweedFS. Owns its process; ``kill`` ends it, ``start`` brings it back with what it had."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ports = dict(zip(("s3", "master", "filer", "volume", "admin"), _free_ports(5), strict=True))
        self.server = Server(f"http://127.0.0.1:{self._ports['s3']}")
        self._process: subprocess.Popen[bytes] | None = None
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEYS["access_key_id"], "secretKey": KEYS["secret_access_key"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (directory / "data").mkdir(parents=True)
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def start(self) -> None:
        weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
        options = {
            "dir": self._directory / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",  # its default is every address
            "master.telemetry": "false",
            "admin.ui": "false",
            "webdav": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.iam": "false",
            "s3.autoCreateBucket": "false",
            "master.volumeSizeLimitMB": 256,
            "s3.config": self._directory / "s3.json",
            "bucket": BUCKET,
            **{f"{name}.port": port for name, port in self._ports.items()},
        }
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [weed, "mini", *(f"-{name}={value}" for name, value in options.items())],
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env={"GOMEMLIMIT": "256MiB", "GOGC": "50", "HOME": str(self._directory)},
            )
        self._wait()

    def _wait(self) -> None:
        """Until it answers: its port is open long before."""
        assert self._process is not None
        store, deadline = self.server.store(), time.monotonic() + PATIENCE
        while True:
            try:
                obstore.put(store, "is-up", b"", use_multipart=False)
                return
            except (obstore.exceptions.BaseError, FileNotFoundError):
                log = (self._directory / "log").read_text(errors="replace")[-2000:]
                assert self._process.poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def seaweed_server(directory: Path) -> Iterator[Seaweed]:
    seaweed = Seaweed(directory)
    try:
        seaweed.start()
        yield seaweed
    finally:
        seaweed.kill()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def moto_server() -> Iterator[Server]:
    """One in this process: exact, and it lets everybody in."""
    from moto.server import ThreadedMotoServer

    (port,) = _free_ports(1)
    thread = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    thread.start()
    server = Server(f"http://127.0.0.1:{port}")
    try:
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        thread.stop()


@dataclass(frozen=True)
class Fault:
    """What becomes of one request."""

    kind: Literal["status", "reset", "lost answer", "truncate", "flip", "hold"]
    status: int = 503
    """Of an answer that the server never gave."""
    until: asyncio.Event | None = None
    """For a request that is held."""


@dataclass
class Proxy:
    """Stands before a server. Counts requests; ``fault`` says what is done to one, by its first line."""

    upstream: int
    fault: Callable[[str], Fault | None] = lambda line: None
    strip: bytes = b""
    """A header that does not get through, in lower case."""
    seen: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    """Of bodies, to the client."""
    server: Server = field(init=False)
    _came: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, text: str) -> None:
        """Until a request with ``text`` in its first line has come."""
        while not any(text in line for line in self.seen):
            self._came.clear()
            await self._came.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while head := await _head(reader):
                line = head.split(b"\r\n")[0].decode()
                body = await _body(reader, head)
                self.seen.append(line)
                self._came.set()
                fault = self.fault(line)
                if fault is not None and fault.kind == "hold":
                    assert fault.until is not None
                    await fault.until.wait()
                if fault is not None and fault.kind == "reset":
                    writer.transport.abort()
                    return
                if fault is not None and fault.kind == "status":
                    writer.write(f"HTTP/1.1 {fault.status} Fault\r\nContent-Length: 0\r\n\r\n".encode())
                    continue
                if up is None:
                    up = await asyncio.open_connection("127.0.0.1", self.upstream)
                up[1].write(self._stripped(head) + body)
                answer = await _head(up[0])
                content = b"" if line.startswith("HEAD") else await _body(up[0], answer)
                if fault is not None and fault.kind == "lost answer":
                    writer.transport.abort()
                    return
                if fault is not None and fault.kind == "flip" and content:
                    middle = len(content) // 2
                    content = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
                if fault is not None and fault.kind == "truncate":
                    writer.write(answer + content[: len(content) // 2])
                    await writer.drain()
                    return
                self.sent_bytes += len(content)
                writer.write(answer + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # either side went away, as it may
        finally:
            writer.close()
            if up is not None:
                up[1].close()

    def _stripped(self, head: bytes) -> bytes:
        lines = head.split(b"\r\n")
        return b"\r\n".join(
            line for line in lines if not (self.strip and line.lower().startswith(self.strip))
        )


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return b""


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if fields.get(b"transfer-encoding") != b"chunked":
        return await reader.readexactly(int(fields.get(b"content-length", 0)))
    chunks = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        chunk = await reader.readexactly(int(size, 16) + 2)
        chunks += size + chunk
        if int(size, 16) == 0:
            return chunks


@contextlib.asynccontextmanager
async def proxy_to(server: Server) -> AsyncIterator[Proxy]:
    """A proxy on this loop, with whose server one may talk as with ``server``."""
    proxy = Proxy(int(server.endpoint.rpartition(":")[2]))
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await proxy.serve(reader, writer)
        tasks.discard(task)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 26)
    proxy.server = Server(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    try:
        yield proxy
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
