"""Feed a trainer from asynchronous readers, stop it half way, resume it: no sample is lost, none comes twice.

    python async_data_pipeline.py

In: nothing; it writes shards of text into a temporary directory. Out: the story of two runs, A that nobody
stops and B that is stopped and resumed, and exit status 0 only if both trained on the same samples in the
same order and ended with the same weights, bit for bit. `train` and `MixedShards` are the parts to copy.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiofiles
import torch
import uvloop
from torch import Tensor, nn

from dcp_async import AsyncSaveResponse, CheckpointEngine, Every, RNGState

BLOCK_BYTES = 1024  # what a reader asks its file for at once; a megabyte, where shards are not toys


async def train(options: argparse.Namespace, root: Path, run: Run, *, stop_after: int | None = None) -> None:
    """Train to `options.steps` from wherever the newest checkpoint below `root` left off; log to `run`."""
    torch.manual_seed(run.seed)
    data = MixedShards(options.shards, batch_size=options.batch_size, prefetch=options.prefetch)
    trainer = Trainer()
    state = {"model": trainer.model, "optim": trainer.optimizer, "data": data, "rng": RNGState()}

    # One group for everything that runs beside the training: a reader that fails, or an upload, ends the run.
    engine = CheckpointEngine(root, policy=Every(steps=options.save_every))
    async with engine, asyncio.TaskGroup() as group:
        start = (await engine.load(state)).next_step if await engine.latest() else 1
        run.line(f"starts at step {start}")
        data.start(group)  # now that the pipeline knows its place

        for step in range(start, options.steps + 1):
            batch = await data.next_batch()
            # In a thread, so that the readers go on while this batch is trained on.
            loss = await asyncio.to_thread(trainer.step, batch.tokens())
            run.trained(step, batch, loss)

            if engine.should_save(step):
                response = await engine.save(state, step=step)  # the upload goes on while the next steps run
                group.create_task(run.follow(response))
            if step == stop_after:
                run.stopped(step, data)
                raise Stopped  # the group cancels the readers; the engine waits for an upload under way
        data.stop()
    run.digest = weights_digest(trainer.model)


class MixedShards:
    """An endless stream of batches out of several files, that resumes behind the last batch handed out.

    One task a shard reads records ahead into a bounded queue; another draws from these queues, at random but
    in an order that the batch's number alone decides, and packs batches into a bounded queue of its own. When
    the trainer is slow the queues fill and the readers wait; no more is ever read ahead than they hold.

    A batch carries the place in every shard behind it, which becomes the pipeline's when the trainer takes
    the batch. So a checkpoint knows nothing of what was read ahead: after a resume that is read once more.
    """

    def __init__(self, shards: Sequence[Path], *, batch_size: int, prefetch: int) -> None:
        self._shards = {shard.name: shard for shard in shards}
        self._batch_size = batch_size
        self._records = {name: asyncio.Queue[Record](maxsize=2 * batch_size) for name in self._shards}
        self._batches = asyncio.Queue[Batch](maxsize=prefetch)
        self._tasks: list[asyncio.Task[None]] = []
        self._number = 0  # of batches that the trainer took
        self._offsets = dict.fromkeys(self._shards, 0)  # in bytes, behind the last record that it took

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number, "offsets": dict(self._offsets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["offsets"].keys() != self._shards.keys():
            raise ValueError(
                f"the position is one in {sorted(state['offsets'])}, not in {sorted(self._shards)}"
            )
        self._number, self._offsets = state["number"], dict(state["offsets"])

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin to read ahead, in tasks of the caller's group."""
        readers = [self._read(name, self._offsets[name]) for name in self._shards]
        self._tasks = [
            group.create_task(work) for work in (*readers, self._pack(self._number, self._offsets))
        ]

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def next_batch(self) -> Batch:
        batch = await self._batches.get()
        self._number, self._offsets = batch.number, batch.offsets
        return batch

    @property
    def num_read_ahead(self) -> int:
        """Records that wait in the queues."""
        in_batches = self._batches.qsize() * self._batch_size
        return in_batches + sum(queue.qsize() for queue in self._records.values())

    async def _read(self, name: str, offset: int) -> None:
        """Read one shard over and over, beginning at `offset`; nothing is read only to be skipped."""
        async with aiofiles.open(self._shards[name], "rb") as file:
            while True:
                await file.seek(offset)
                while lines := await file.readlines(BLOCK_BYTES):
                    for line in lines:
                        offset += len(line)
                        await self._records[name].put(Record(text=line, end=offset))
                offset = 0

    async def _pack(self, number: int, offsets: Mapping[str, int]) -> None:
        names = sorted(self._shards)
        while True:
            number += 1
            texts, offsets = [], dict(offsets)
            for name in random.Random(number).choices(names, k=self._batch_size):
                record = await self._records[name].get()
                texts.append(record.text)
                offsets[name] = record.end
            await self._batches.put(Batch(number=number, texts=tuple(texts), offsets=offsets))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A line of a shard and where it ends there."""

    text: bytes
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The `number`th batch of the stream, and where each shard is to be read on behind it."""

    number: int
    texts: tuple[bytes, ...]
    offsets: dict[str, int]

    def tokens(self) -> Tensor:
        """Bytes, padded with zeros: (batch, time)."""
        longest = max(map(len, self.texts))
        return torch.tensor([list(text.ljust(longest, b"\0")) for text in self.texts])


class Trainer:
    """A recurrent network that learns sums, byte by byte. Its dropout needs the RNGState in the state."""

    def __init__(self) -> None:
        self.model = nn.ModuleDict(
            {"bytes": nn.Embedding(256, 32), "recurrent": nn.GRU(32, 128, batch_first=True)}
            | {"dropout": nn.Dropout(0.1), "head": nn.Linear(128, 256)}
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def step(self, tokens: Tensor) -> float:
        hidden, _ = self.model["recurrent"](self.model["bytes"](tokens[:, :-1]))
        logits = self.model["head"](self.model["dropout"](hidden))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        self.optimizer.step()
        return float(loss.item())


@dataclass(slots=True, kw_only=True)
class Run:
    """What one run saw and said; survives a stop, as a log file would."""

    name: str
    seed: int
    seen: dict[int, tuple[bytes, ...]] = field(default_factory=dict)  # records, by step
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=10))
    num_unused: int = 0
    digest: str = ""

    def line(self, text: str) -> None:
        print(f"{self.name}   {text}", flush=True)

    def trained(self, step: int, batch: Batch, loss: float) -> None:
        self.seen[step] = batch.texts
        self.losses.append(loss)
        if step % 10 == 0:
            mean = sum(self.losses) / len(self.losses)
            self.line(f"step {step:>4}  loss {mean:.3f}  {batch.texts[-1].decode().strip()}")

    async def follow(self, response: AsyncSaveResponse) -> None:
        info = await response.upload_completion
        self.line(f"step {info.step:>4}  is on the disk, {info.nbytes / 1e3:.0f} kB")

    def stopped(self, step: int, data: MixedShards) -> None:
        self.num_unused = data.num_read_ahead
        self.line(f"step {step:>4}  stopped; {self.num_unused} records had been read ahead for nothing")


class Stopped(Exception):
    """Run B is stopped here."""


async def prove(options: argparse.Namespace, directory: Path) -> bool:
    """Run A, then B in two parts, below `directory`, and compare."""
    nbytes = sum(shard.stat().st_size for shard in options.shards)
    loop = type(asyncio.get_running_loop())
    print(f"{len(options.shards)} shards, {nbytes / 1e3:.0f} kB; event loop: {loop.__module__}")

    a = Run(name="A ", seed=1)
    await train(options, directory / "a", a)
    b = Run(name="B ", seed=1)
    try:
        await train(options, directory / "b", b, stop_after=options.stop_after)
    except* Stopped:
        pass
    # Fresh objects, and from another seed: whatever is equal below came out of the checkpoint.
    resumed = Run(name="B'", seed=2)
    await train(options, directory / "b", resumed)

    # The steps behind B's newest checkpoint are lost, weights and all; the same records make them once more.
    first = min(resumed.seen)
    trained = {step: texts for step, texts in b.seen.items() if step < first} | resumed.seen
    num_records = sum(map(len, a.seen.values()))
    newest = options.stop_after - options.stop_after % options.save_every
    room = options.batch_size * (options.prefetch + 2 * len(options.shards))
    is_bounded = 0 < b.num_unused <= room
    claims = {
        f"stopped after step {options.stop_after}, B went on behind step {newest}": first == newest + 1,
        f"{b.num_unused} records had been read ahead, the queues hold {room} at most": is_bounded,
        f"A and B trained on the same {num_records} records, in the same order": trained == a.seen,
        f"A and B ended with the same weights, bit for bit: {a.digest[:16]}": resumed.digest == a.digest,
    }
    for claim, held in claims.items():
        print(f"{'proved' if held else 'FAILED'}: {claim}")
    return all(claims.values())


def weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def make_shards(directory: Path, *, count: int, num_records: int) -> list[Path]:
    """Write files of sums, one a line; the hundreds on the left name the shard."""
    directory.mkdir()
    shards = [directory / f"shard-{index}.txt" for index in range(count)]
    for index, shard in enumerate(shards):
        numbers = random.Random(index)
        pairs = ((100 * index + numbers.randrange(100), numbers.randrange(100)) for _ in range(num_records))
        shard.write_text("".join(f"{left}+{right}={left + right}\n" for left, right in pairs))
    return shards


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=60, help="of a whole run (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS", help="default: %(default)s")
    parser.add_argument(
        "--stop-after", type=int, default=37, metavar="STEP", help="of B (default: %(default)s)"
    )
    parser.add_argument("--num-shards", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--num-records", type=int, default=200, metavar="N", help="a shard; default: %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--prefetch", type=int, default=4, metavar="BATCHES", help="default: %(default)s")
    parser.add_argument(
        "--loop", choices=("asyncio", "uvloop"), default="uvloop", help="default: %(default)s"
    )
    options = parser.parse_args()
    if not options.save_every <= options.stop_after < options.steps:
        parser.error("B must be stopped after its first save and before its last step")

    # Without these two, sums may run in another order the next time, and the last bits of the weights differ.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    factory = uvloop.new_event_loop if options.loop == "uvloop" else asyncio.new_event_loop
    with (
        tempfile.TemporaryDirectory(prefix="dcp_async-pipeline-") as name,
        asyncio.Runner(loop_factory=factory) as runner,
    ):
        directory = Path(name)
        options.shards = make_shards(
            directory / "shards", count=options.num_shards, num_records=options.num_records
        )
        return 0 if runner.run(prove(options, directory)) else 1


if __name__ == "__main__":
    sys.exit(main())
