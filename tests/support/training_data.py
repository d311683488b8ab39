"""Datasets that tell where they were read, and data pipelines that keep a state of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tests.support.doubles import mapped_arena_bytes, open_descriptors

LENGTH = 24


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> int:
        return index


class Counting(Numbers):
    """Remembers how often it was asked, and shows it in what it gives."""

    def __init__(self) -> None:
        self.asked = 0

    def __getitem__(self, index: int) -> int:
        self.asked += 1
        return index + 1000 * self.asked

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


class Growing(Numbers):
    """Its state takes another form as soon as it has something to tell, as a buffer of a shuffle does."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def __getitem__(self, index: int) -> int:
        number = len(self.seen.get("order", ()))
        self.seen = {"order": [*self.seen.get("order", ()), index], "last": torch.tensor([index])}
        return index + 1000 * number

    def state_dict(self) -> dict[str, Any]:
        return dict(self.seen)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = dict(state)


class Stream(IterableDataset[int]):
    """Each worker gives its share of the numbers, from where it was."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        stride, first = (info.num_workers, info.id) if info else (1, 0)
        while (number := first + self.at * stride) < LENGTH:
            self.at += 1
            yield number
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Witness(Dataset[tuple[int, int, int]]):
    """What a process that reads it has of its parent's: (its id, lease descriptors, bytes of the pool)."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        leases = [target for target in open_descriptors().values() if ".lease-" in target]
        return os.getpid(), len(leases), mapped_arena_bytes()
