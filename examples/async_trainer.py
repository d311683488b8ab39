"""Train a small byte-level transformer, checkpoint it while it trains, resume it when it is run again.

    python async_trainer.py --out checkpoints/run1

In: the text of CPython's own help topics. Out: checkpoints under --out, and one line that names the step the
run resumed from and a digest of the final weights. Killed at any moment and run again, it ends with the
weights of a run that nobody killed, bit for bit: model, optimizer, schedule, random numbers and place in the
text all come back. SIGTERM has it save once more and end. `train` is the part to copy.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import pydoc_data.topics
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dcp_async import (
    CheckpointEngine,
    Every,
    LoadReport,
    RNGState,
    SaveCommitted,
    SaveFailed,
    SaveProgress,
    SaveStaged,
    SaveStarted,
    StagingOptions,
)


async def train(options: argparse.Namespace, report: Report) -> None:
    """Train to `options.steps` steps from wherever the newest whole checkpoint in `options.out` left off."""
    trainer = Trainer(options)
    staging = StagingOptions(overlap=options.overlap)

    policy = Every(steps=options.save_every)

    async with CheckpointEngine(options.out, staging=staging, policy=policy, observer=report) as engine:
        loaded = await engine.load(trainer.state) if await engine.latest() else None
        start = loaded.next_step if loaded else 1
        report.started(loaded, trainer.num_parameters)

        last = max(start - 1, options.steps)
        # Schedulers send SIGTERM, and SIGKILL a while behind it: the first has one more checkpoint made here.
        async with trainer.data.batches() as batches, engine.preemption(signal.SIGTERM):
            for step in range(start, options.steps + 1):
                tokens = await anext(batches)
                began = time.perf_counter()
                # In a thread, so that the pipeline prepares the next batches while this one is trained on.
                loss = await asyncio.to_thread(trainer.step, tokens)
                report.stepped(step, loss, time.perf_counter() - began)

                if engine.should_save(step) or step == options.steps:
                    began = time.perf_counter()
                    await engine.save(trainer.state, step=step)  # the upload goes on while the next steps run
                    report.save_returned(step, time.perf_counter() - began)
                if engine.preempted:
                    last = step
                    break

    # Leaving the engine's block waited for the last upload: what is reported as done is on the disk.
    digest = weights_digest(trainer.model.state_dict())
    report.finished(last, loaded, digest, preempted=engine.preempted)


class Trainer:
    """A training run; `state` names all that its next steps depend on."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.model = ByteTransformer(
            width=options.width,
            depth=options.depth,
            heads=options.heads,
            context=options.context,
            dropout=options.dropout,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, learning_rate_factor)
        self.data = TextPipeline(
            batch_size=options.batch_size,
            context=options.context,
            seed=options.seed,
            prefetch=options.prefetch,
        )
        self.state: dict[str, Any] = {
            "model": self.model,
            "optim": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.data,
            "rng": RNGState(),  # dropout draws from it
        }
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, tokens: Tensor) -> float:
        """Take one step on `tokens` (batch, context + 1) and return its loss in nats a byte."""
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.item())


def learning_rate_factor(num_steps: int, *, warmup: int = 10) -> float:
    """Rise for `warmup` steps, then fall as 1/sqrt: a schedule without an end, so every run can go on."""
    return min((num_steps + 1) / warmup, math.sqrt(warmup / (num_steps + 1)))


class ByteTransformer(nn.Module):
    """Logits of the next byte at each place of (batch, time) bytes; a place sees none behind it."""

    def __init__(self, *, width: int, depth: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.dropout(self.bytes(tokens) + self.places.weight[:length])
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens and the place in the stream they come from: its epoch, and its number within the epoch."""

    epoch: int
    index: int
    tokens: Tensor


class TextPipeline:
    """An endless stream of batches that resumes behind the last one yielded, however many wait prepared.

    Two tasks work ahead of the trainer, joined by bounded queues: one reads documents, in another order each
    epoch, one packs them into batches. A batch carries its position, which becomes the pipeline's when the
    batch is handed out; those still in the queue at a save are made again after a resume.
    """

    def __init__(self, *, batch_size: int, context: int, seed: int, prefetch: int) -> None:
        self._batch_shape = (batch_size, context + 1)
        self._seed = seed
        self._prefetch = prefetch
        self._epoch, self._index = 0, -1  # of the last batch yielded

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._epoch, self._index = state["epoch"], state["index"]

    @asynccontextmanager
    async def batches(self) -> AsyncIterator[AsyncIterator[Tensor]]:
        """Run the two tasks for as long as the block; one that fails fails the block."""
        documents: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(maxsize=8)
        batches: asyncio.Queue[Batch] = asyncio.Queue(maxsize=self._prefetch)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(documents))
            packer = group.create_task(self._pack(documents, batches))
            yield self._yield(batches)
            reader.cancel()
            packer.cancel()

    async def _read(self, documents: asyncio.Queue[tuple[int, bytes]]) -> None:
        topics = sorted(pydoc_data.topics.topics.items())
        epoch = self._epoch
        while True:
            for _, text in random.Random(f"{self._seed}, {epoch}").sample(topics, len(topics)):
                await documents.put((epoch, text.encode()))
            epoch += 1

    async def _pack(self, documents: asyncio.Queue[tuple[int, bytes]], batches: asyncio.Queue[Batch]) -> None:
        nbytes = self._batch_shape[0] * self._batch_shape[1]
        last_yielded = self._epoch, self._index
        text, epoch, index = bytearray(), self._epoch, 0
        while True:
            document_epoch, document = await documents.get()
            if document_epoch != epoch:  # the rest of an epoch is too short for a batch
                text, epoch, index = bytearray(), document_epoch, 0
            text += document
            while len(text) >= nbytes:
                if (epoch, index) > last_yielded:
                    tokens = torch.frombuffer(text[:nbytes], dtype=torch.uint8).long().view(self._batch_shape)
                    await batches.put(Batch(epoch=epoch, index=index, tokens=tokens))
                del text[:nbytes]
                index += 1

    async def _yield(self, batches: asyncio.Queue[Batch]) -> AsyncIterator[Tensor]:
        while True:
            batch = await batches.get()
            self._epoch, self._index = batch.epoch, batch.index
            yield batch.tokens


class Report:
    """Tell a person, or with `--json` a program, how the run goes; one line a fact, on stdout.

    It is the engine's observer too. `on_event` runs on the engine's thread, so a line is one write.
    """

    def __init__(self, *, style: Literal["text", "quiet", "json"], log_every: int) -> None:
        self._style = style
        self._log_every = log_every
        self._losses: list[float] = []  # since the last line
        self._staging: dict[str, float] = {}  # seconds, by checkpoint

    def started(self, loaded: LoadReport | None, num_parameters: int) -> None:
        origin = f"resumed from step {loaded.step}" if loaded else "fresh start"
        self._line(
            "started",
            f"{origin}: {num_parameters / 1e6:.1f} M parameters",
            resumed_from=loaded.step if loaded else None,
            skipped=loaded.skipped if loaded else (),
            num_parameters=num_parameters,
        )

    def stepped(self, step: int, loss: float, seconds: float) -> None:
        text = None
        self._losses.append(loss)
        if step % self._log_every == 0:
            text = f"step {step:>5}  loss {fmean(self._losses):.3f}  {seconds * 1e3:.0f} ms a step"
            self._losses.clear()
        self._line("step", text, step=step, loss=loss, seconds=seconds)

    def save_returned(self, step: int, seconds: float) -> None:
        text = f"step {step:>5}  save() held the trainer for {seconds * 1e3:.0f} ms"
        self._line("save_returned", text, step=step, stall=seconds)

    def on_event(self, event: object) -> None:
        match event:
            case SaveStarted():
                self._save_line("save_started", event, nbytes=event.nbytes)
            case SaveStaged():
                self._staging[event.checkpoint_id] = event.seconds
                self._save_line("save_staged", event, nbytes=event.nbytes, seconds=event.seconds)
            case SaveProgress():
                self._save_line(
                    "save_progress", event, written_bytes=event.written_bytes, nbytes=event.nbytes
                )
            case SaveFailed():
                self._staging.pop(event.checkpoint_id, None)
                self._line(
                    "save_failed",
                    f"step {event.step:>5}  save failed: {event.error}",
                    checkpoint_id=event.checkpoint_id,
                    step=event.step,
                    error=str(event.error),
                )
            case SaveCommitted():
                upload = event.seconds - self._staging.pop(event.checkpoint_id)
                nbytes = event.info.nbytes
                self._line(
                    "save_committed",
                    f"step {event.step:>5}  saved: {nbytes / 1e6:.0f} MB, upload {upload:.2f} s, "
                    f"durable after {event.seconds:.2f} s, {nbytes / event.seconds / 1e9:.2f} GB/s",
                    checkpoint_id=event.checkpoint_id,
                    step=event.step,
                    nbytes=nbytes,
                    upload=upload,
                    seconds=event.seconds,
                )

    def finished(self, step: int, loaded: LoadReport | None, digest: str, *, preempted: bool) -> None:
        outcome = "stopped behind" if preempted else "done at"
        origin = f"resumed from step {loaded.step}" if loaded else "fresh start"
        self._line(
            "finished",
            f"{outcome} step {step} ({origin}), weights sha256 {digest}",
            step=step,
            resumed_from=loaded.step if loaded else None,
            sha256=digest,
        )

    def _save_line(self, kind: str, event: SaveStarted | SaveStaged | SaveProgress, **facts: float) -> None:
        self._line(kind, None, checkpoint_id=event.checkpoint_id, step=event.step, **facts)

    def _line(self, kind: str, text: str | None, **facts: object) -> None:
        if self._style == "json":
            text = json.dumps({"event": kind, "text": text, **facts})
        elif self._style == "quiet" and kind != "finished":
            return
        if text is not None:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of names and bytes: equal digests mean bit-identical weights."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        buffer = bytearray(tensor.nbytes)
        torch.frombuffer(buffer, dtype=tensor.dtype).copy_(tensor.detach().flatten())
        digest.update(name.encode())
        digest.update(buffer)
    return digest.hexdigest()


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoints; resumes if it holds any")
    parser.add_argument("--steps", type=int, default=30, help="train until this step (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=6, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--overlap", action="store_true", help="copy the state while the next step runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="the last bits depend on it (default: 2)")

    model = parser.add_argument_group("model and data")
    model.add_argument("--width", type=int, default=448)
    model.add_argument("--depth", type=int, default=6)
    model.add_argument("--heads", type=int, default=7)
    model.add_argument("--context", type=int, default=64, metavar="BYTES")
    model.add_argument("--dropout", type=float, default=0.1)
    model.add_argument("--lr", type=float, default=1e-3)
    model.add_argument("--batch-size", type=int, default=4)
    model.add_argument("--prefetch", type=int, default=4, metavar="BATCHES", help="prepared ahead at most")

    style = parser.add_mutually_exclusive_group()
    style.add_argument("--quiet", dest="style", action="store_const", const="quiet", help="only the result")
    style.add_argument("--json", dest="style", action="store_const", const="json", help="JSON lines")
    parser.set_defaults(style="text")
    parser.add_argument("--log-every", type=int, default=3, metavar="STEPS", help="default: %(default)s")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_options()
    # Without these two, sums may run in another order the next time, and the last bits of the weights differ.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(options.threads)
    report = Report(style=options.style, log_every=options.log_every)
    try:
        asyncio.run(train(options, report))
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the newest whole checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
