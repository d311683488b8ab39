"""Whatever a trainer queues around saves and loads, on however many streams: each checkpoint holds the state
of its save(), each load wins over what was queued before it, no slot is given out under a copy.

A case is a seed: of what the trainer does and, in most cases, of the order in which the fake's streams run.
Threads are real, so a seed does not repeat to the letter; a violation of one seed shows within a few runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import torch
from hypothesis import given

from dcp_async import (
    AsyncSaveResponse,
    CheckpointEngine,
    Limits,
    LoadError,
    SaveError,
    Stager,
    StagingOptions,
)
from dcp_async.staging import Lease
from dcp_async.staging.device import Purpose
from tests.support.accelerator import FakeAccelerator, Order
from tests.support.device_memory import Memory
from tests.support.device_queue import FakeStream
from tests.support.doubles import MIB, difference
from tests.support.saves import PART

NUM_ACTIONS = 9
SHAPES: list[tuple[int, ...]] = [(), (0, 3), (7,), (33, 40), (100, 128), (150, 257)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]


class Trainer:
    """A training script: what it queues, and what each of its tensors holds in the order of its program."""

    def __init__(self, seed: int) -> None:
        self.random = choice = random.Random(seed)
        order: Order = choice.choice(get_args(Order))
        self.fake = FakeAccelerator(
            choice.randint(1, 2), seed=seed if choice.random() < 0.7 else None, order=order
        )
        self.fake.refuses_pins = choice.random() < 0.2
        self.fake.has_pinned_buffers = choice.random() < 0.8
        self.streams = {
            device: [self.fake.current_stream(device), *(self.fake.new_stream(device) for _ in range(2))]
            for device in self.fake.all_devices
        }
        self.state: dict[str, torch.Tensor] = {"host": torch.ones(9)}
        self.expected: dict[str, torch.Tensor] = {"host": torch.ones(9)}
        self.junk: list[torch.Tensor] = []
        for number in range(choice.randint(1, 7)):
            self.replace(f"w{number}")

    def replace(self, name: str) -> None:
        """A new tensor takes the place of an older one, whose memory is free from here on."""
        choice = self.random
        value = torch.full(choice.choice(SHAPES), choice.randrange(100)).to(choice.choice(DTYPES))
        value.view(-1)[::3] = choice.randrange(100)
        made = self.fake.tensor(value, self.device_of(name))
        layout = choice.random()
        if value.dim() == 2 and layout < 0.3:
            made, value = made.t(), value.t()
        elif value.dim() == 2 and layout < 0.5:
            made, value = made[:, ::2], value[:, ::2]
        self.state[name], self.expected[name] = made, value.contiguous()

    def device_of(self, name: str) -> torch.device:
        """Where the tensor of that name lies all its life: torch, which would notice a move, sees none."""
        return self.fake.all_devices[int(name[1:]) % len(self.fake.all_devices)]

    def change(self, name: str) -> None:
        amount = self.random.randrange(1, 9)
        kernel: Callable[[torch.Tensor], object] = self.random.choice(
            [lambda values: values.fill_(amount), lambda values: values.mul_(2).add_(amount)]
        )
        kernel(self.expected[name])
        if name == "host":
            kernel(self.state[name])
        else:
            self.fake.change(self.state[name], kernel)

    def change_some(self) -> None:
        for name in self.random.sample(list(self.state), self.random.randint(1, len(self.state))):
            self.change(name)

    def allocate(self) -> None:
        """Memory for something else, of the size of one of the state's tensors, which may be where it was."""
        like = self.random.choice([t for n, t in self.state.items() if n != "host"])
        device = self.fake.device_of(like)
        made = self.fake.empty(*like.shape, dtype=like.dtype, device=device)
        if made.numel():
            self.fake.fill(made, 99)
        self.junk.append(made)
        if len(self.junk) > 3:
            self.junk.pop(self.random.randrange(len(self.junk)))

    def switch(self) -> None:
        """Go on on another stream, after what this one has queued."""
        device = self.random.choice(self.fake.all_devices)
        event = self.fake.current_stream(device).record()
        self.fake.set_stream(self.random.choice(self.streams[device]))
        self.fake.current_stream(device).wait_event(event)

    def held(self) -> dict[str, torch.Tensor]:
        """What the state holds, for whoever asks on the current streams."""
        return {
            name: self.fake.values(tensor) if name != "host" else tensor.clone()
            for name, tensor in self.state.items()
        }


class Run:
    """One engine under one trainer."""

    def __init__(self, trainer: Trainer, engine: CheckpointEngine, *, overlap: bool) -> None:
        self.trainer, self.engine, self.overlap = trainer, engine, overlap
        self.saved: dict[int, dict[str, torch.Tensor]] = {}
        self.pending: dict[int, AsyncSaveResponse] = {}
        self.may_fail: set[int] = set()
        self.step = 0

    async def save(self) -> None:
        trainer, self.step = self.trainer, self.step + 1
        if trainer.random.random() < 0.25:  # a device that refuses a batch half way
            self.let_fail("save")
        if any(stream.fail_copy_after is not None for stream in trainer.fake.streams):
            self.may_fail |= {self.step, *self.pending}
        self.saved[self.step] = {name: value.clone() for name, value in trainer.expected.items()}
        try:
            self.pending[self.step] = await self.engine.save(trainer.state, step=self.step)
        except SaveError as error:
            self.failed(self.step, error)

    def let_fail(self, purpose: Purpose) -> FakeStream:
        choice, fake = self.trainer.random, self.trainer.fake
        stream = fake.stream(choice.choice(fake.all_devices), purpose)
        stream.fail_copy_after, stream.batches_before_failure = choice.randrange(3), choice.randrange(3)
        return stream

    def failed(self, step: int, error: SaveError) -> None:
        assert step in self.may_fail, f"save {step} failed without a reason: {error!r}"
        del self.saved[step]

    async def staged(self) -> None:
        """What a script waits for that has no optimizer in its state."""
        for response in self.pending.values():
            with contextlib.suppress(SaveError):
                await response.staging_completion

    async def finished(self) -> None:
        """No save is in flight; those that failed had a reason."""
        pending, self.pending = self.pending, {}
        for step, response in pending.items():
            try:
                await response.upload_completion
            except SaveError as error:
                self.failed(step, error)

    async def change(self) -> None:
        if self.overlap:
            if self.trainer.random.random() < 0.6:
                await self.staged()
            # a change before that is refused, or it came too late to be seen in the bytes
            self.may_fail |= {s for s, r in self.pending.items() if not r.staging_completion.done()}
        self.trainer.change_some()

    async def load(self) -> None:
        await self.finished()
        trainer, step = self.trainer, self.trainer.random.choice([*self.saved, None])
        if step is None:
            return
        fits = {n: (t.shape, t.dtype) for n, t in trainer.expected.items()} == {
            n: (t.shape, t.dtype) for n, t in self.saved[step].items()
        }
        if not fits:  # another state, of that step's shapes
            trainer.state = {
                name: torch.zeros_like(value)
                if name == "host"
                else trainer.fake.empty(*value.shape, dtype=value.dtype, device=trainer.device_of(name))
                for name, value in self.saved[step].items()
            }
        trainer.expected = {name: value.clone() for name, value in self.saved[step].items()}
        for tensor in trainer.state.values():  # queued, and not run when load() is called
            if trainer.fake.device_of(tensor) and tensor.numel():
                trainer.fake.fill(tensor, 77)
        atomic = trainer.random.random() < 0.5
        if trainer.random.random() < 0.2:  # a device that refuses a batch, if one comes
            stream = self.let_fail("load")
            with contextlib.suppress(LoadError):
                await self.engine.load(trainer.state, step, atomic=atomic)
            stream.fail_copy_after = None
        await self.engine.load(trainer.state, step, atomic=atomic)
        if trainer.random.random() < 0.5:
            trainer.change_some()  # queued behind the load, and not before it
        self.compare(trainer.held(), trainer.expected, f"the state after load({step})")

    async def look(self) -> None:
        """Every checkpoint holds the state of its save()."""
        await self.finished()
        for step, expected in self.saved.items():
            self.compare(await self.engine.read(step), expected, f"checkpoint {step}")
        if self.saved:
            await self.use_once(max(self.saved))

    async def use_once(self, step: int) -> None:
        """Read onto a device, and let go of it while what uses it is queued still."""
        fake, device = self.trainer.fake, self.trainer.fake.all_devices[-1]
        made = await self.engine.read(step, device=device)
        kept = {name: torch.empty_like(tensor) for name, tensor in made.items()}
        stream = fake.current_stream(device)
        for name, tensor in made.items():
            stream.launch(partial(keep, kept[name], Memory.of(tensor)))
        made.clear()
        del tensor
        with fake.on_stream(fake.new_stream(device)):  # which waits for nothing
            await self.engine.read(step, device=device)
        stream.synchronize()
        self.compare(kept, self.saved[step], f"what was read of checkpoint {step}")

    def compare(self, found: dict[str, Any], expected: dict[str, torch.Tensor], what: str) -> None:
        text = difference(found, expected)
        assert text is None, f"{what}: {text}"


def keep(target: torch.Tensor, source: Memory) -> None:
    target.copy_(source.tensor())


def check_leases(stager: Stager, fake: FakeAccelerator) -> None:
    """From here on each slot that is given out is one that no queued copy will touch."""
    pool, lease, lease_now = stager.pool, stager.pool.lease, stager.pool.lease_now

    def checked(taken: Lease) -> Lease:
        memory = torch.frombuffer(taken.memory(0, taken.count * taken.slot_bytes), dtype=torch.uint8)
        fake.assert_idle(memory.data_ptr(), memory.nbytes)
        return taken

    async def checked_lease(wanted: int) -> Lease:
        return checked(await lease(wanted))

    def checked_lease_now(wanted: int) -> Lease | None:
        taken = lease_now(wanted)
        return None if taken is None else checked(taken)

    vars(pool).update(lease=checked_lease, lease_now=checked_lease_now)


async def run(seed: int, root: str) -> None:
    trainer = Trainer(seed)
    choice, fake = trainer.random, trainer.fake
    overlap = choice.random() < 0.5
    budget = choice.choice([None, None, 3 * PART + (8 * MIB if overlap else 0)])
    pinned = choice.choice([None, False])
    options = StagingOptions(overlap=overlap, part_bytes=PART, budget_bytes=budget, pinned=pinned)
    async with (
        Stager(options, backend=fake) as stager,
        CheckpointEngine(root, staging=stager, limits=Limits(pending_saves=choice.randint(1, 3))) as engine,
    ):
        check_leases(stager, fake)
        case = Run(trainer, engine, overlap=overlap)
        if choice.random() < 0.5:
            await engine.prepare(trainer.state)
        await case.save()
        for _ in range(NUM_ACTIONS):
            what = choice.random()
            if what < 0.35:
                await case.change()
            elif what < 0.5:
                trainer.switch()
            elif what < 0.55:
                trainer.allocate()
            elif what < 0.65:
                trainer.replace(choice.choice([name for name in trainer.state if name != "host"]))
            elif what < 0.85:
                await case.save()
            else:
                await case.load()
        await case.look()
        fake.finish()
        case.compare(trainer.held(), trainer.expected, "the state at the end")
    assert fake.violations == []
    if fake.pinned:
        gc.collect()  # of a save that failed something may hang on its error's traceback
    assert fake.pinned == {}, "memory stays pinned that is gone"


@given(seed=st.integers(0, 2**32 - 1))
def test_saves_and_loads_keep_the_order_of_the_program_whatever_the_devices_do(
    workplace: Path, seed: int
) -> None:
    with tempfile.TemporaryDirectory(dir=workplace) as root:
        asyncio.run(run(seed, root))
