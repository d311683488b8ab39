"""A real training step beside saves: the text transformer of examples/async_trainer.py on the CPU.

In: an engine's name, then commands. Out: seconds of every step and every save call.
Keeps: an engine is called as in a trainer: nothing changes the weights before the state may be mutated, and a
save waits for the one before it.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..engines import Pending, make
from .processes import ROOT

sys.path.append(str(ROOT / "examples"))

from async_trainer import Trainer, parse_options

SAVE_EVERY = 20
TARGET_SECONDS = 0.2
LARGEST_BATCH = 64


class TrainerWorker:
    """The process of one trainer; its commands are those of `processes.Group.take`."""

    def __init__(self, engine: str, root: Path) -> None:
        options = parse_options(["--out", str(root)])
        self._trainer = Trainer(options)
        self._context = options.context
        self._batch = options.batch_size
        text = "".join(pydoc_data.topics.topics.values()).encode()
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._positions = torch.Generator().manual_seed(0)
        self._pending: Pending | None = None
        self._step = 0
        state = {"model": self._trainer.model, "optim": self._trainer.optimizer}
        self._trainer.optimizer.register_step_pre_hook(self._wait_until_staged)
        self._engine = make(engine, state, root)
        self._engine.open()
        self.commands: dict[str, Callable[..., dict[str, Any]]] = {
            "describe": self.describe,
            "calibrate": self.calibrate,
            "train": self.train,
        }
        parameters = list(self._trainer.model.parameters())
        # AdamW keeps two moments of the parameter's size, and a step of 4 bytes.
        self.nbytes = sum(3 * parameter.nbytes + 4 for parameter in parameters)
        self.num_tensors = 4 * len(parameters)

    def describe(self) -> dict[str, Any]:
        return {"call": self._engine.describe()}

    def calibrate(self) -> dict[str, Any]:
        """The batch size for steps of about `TARGET_SECONDS`."""
        seconds = {}
        for batch in (1, 3):
            self._batch = batch
            seconds[batch] = min(self._train_step() for _ in range(4))
        slope = max((seconds[3] - seconds[1]) / 2, 1e-4)
        wanted = round(1 + (TARGET_SECONDS - seconds[1]) / slope)
        return {"batch": min(LARGEST_BATCH, max(1, wanted))}

    def train(self, batch: int, plain: int, saving: int) -> dict[str, Any]:
        """`saving` steps with a save every `SAVE_EVERY`, between two halves of `plain` steps without."""
        self._batch = batch
        for _ in range(2):  # the first ones with this batch size
            self._train_step()
        before, seconds_before = self._plain(plain // 2)
        steps, saves = [], []
        begin = time.perf_counter()
        for number in range(saving):
            if number % SAVE_EVERY == 0:
                saves.append(self._save())
            steps.append(self._train_step())
        wall = time.perf_counter() - begin
        assert self._pending is not None
        self._pending.result()
        self._pending = None
        after, seconds_after = self._plain(plain - plain // 2)
        for old in range(1, self._step + 1):
            self._engine.discard(old)
        return {
            "plain_steps": _rounded([*before, *after]),
            "steps": _rounded(steps),
            "save_calls": _rounded(saves),
            "plain_seconds_a_step": (seconds_before + seconds_after) / plain,
            "saving_seconds_a_step": wall / saving,
        }

    def close(self) -> None:
        self._engine.close()

    def _plain(self, number: int) -> tuple[list[float], float]:
        begin = time.perf_counter()
        steps = [self._train_step() for _ in range(number)]
        return steps, time.perf_counter() - begin

    def _save(self) -> float:
        start = time.perf_counter()
        if self._pending is not None:
            self._pending.result()
        self._step += 1
        self._pending = self._engine.save(self._step)
        return time.perf_counter() - start

    def _wait_until_staged(self, *_: object) -> None:
        if self._pending is not None:
            self._pending.staged()

    def _train_step(self) -> float:
        starts = torch.randint(
            len(self._text) - self._context - 1, (self._batch,), generator=self._positions
        ).tolist()
        tokens = torch.stack([self._text[start : start + self._context + 1] for start in starts])
        began = time.perf_counter()
        self._trainer.step(tokens)
        return time.perf_counter() - began


def _rounded(seconds: list[float]) -> list[float]:
    return [round(value, 5) for value in seconds]
