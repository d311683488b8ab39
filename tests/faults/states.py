"""What the programs of this folder save: every tensor a pure function of a version or of a training step.

`flat()` turns any tree into {path: digest}, so that a test compares what it finds with what should be there,
name by name, across processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

WIDTH = 416
LAYERS = 4
PART_BYTES = 256 * 1024


def flat(tree: object, path: str = "") -> dict[str, str]:
    """{path: digest or repr} of every leaf; keys by repr, so that 0 and "0" differ."""
    return dict(_leaves(tree, path))


def _leaves(tree: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key!r}")
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}/{index}")
    elif isinstance(tree, torch.Tensor):
        data = tree.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.blake2b(data.data, digest_size=12).hexdigest()
        yield path, f"{tree.dtype} {tuple(tree.shape)} {digest}"
    else:
        yield path, repr(tree)


def numbers(version: int, *, megabytes: float = 0.7) -> dict[str, Any]:
    """A small state of mixed dtypes that names its version in every leaf."""
    count = int(megabytes * 2**20 / 4)
    base = torch.arange(count, dtype=torch.float32)
    return {
        "w": base + version * 0.5,
        "half": (base[:70_001] * (version + 1)).to(torch.bfloat16),
        "deep": {"ids": torch.arange(5) + version, "pair": [torch.full((3, 7), float(version)), version]},
        "label": f"version {version}",
    }


def files_of(version: int) -> dict[str, bytes]:
    """What is attached to a version: one file that changes, one that does not, one that comes and goes."""
    files = {"config.json": b'{"version": %d}' % version, "LICENSE": b"free\n"}
    return files if version % 2 else files | {"even.txt": b"even"}


class Trainer:
    """A real model with AdamW whose every step is a function of the step's number and of what came before."""

    def __init__(self) -> None:
        torch.manual_seed(20)
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            layers += [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)]
        self.model = nn.Sequential(*layers)
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        self.progress: dict[str, Any] = {"step": -1, "seen": 0}

    def train(self, step: int) -> None:
        source = torch.Generator().manual_seed(step)
        batch = torch.randn(4, WIDTH, generator=source)
        loss = (self.model(batch) - batch.roll(1, 1)).square().mean()
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        self.progress["step"] = step
        self.progress["seen"] = self.progress["seen"] + len(batch)

    def targets(self) -> dict[str, Any]:
        """What goes to the engine: two Statefuls and a plain mapping."""
        return {"model": self.model, "optim": self.optim, "progress": self.progress}

    def tree(self) -> dict[str, Any]:
        """The same as a plain tree, as stock DCP wants it and as `read` gives it back."""
        return {"model": self.model.state_dict(), "optim": self.optim.state_dict(), "progress": self.progress}


def stock_target(kind: str, *, megabytes: float = 0.7) -> dict[str, Any]:
    """A tree of the right shapes and wrong values for stock DCP to load into."""
    if kind == "numbers":
        return numbers(-1, megabytes=megabytes)
    trainer = Trainer()
    # An optimizer that took no step has no tensors to load into.
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optim.step()
    return trainer.tree()


def versions(inspected: Mapping[str, Any], *, megabytes: float = 0.7, when: str = "") -> dict[str, int]:
    """{checkpoint: version} of what `inspect` found, every leaf compared, as stock DCP reads it too."""
    answer = {}
    for name, entry in inspected["found"].items():
        assert "/'label'" in entry["found"], f"{name} is there and cannot be read {when}: {entry['found']}"
        answer[name] = int(entry["found"]["/'label'"].strip("'").split()[1])
        expected = flat(numbers(answer[name], megabytes=megabytes))
        assert entry["found"] == expected, f"{name} mixes versions or has other bits {when}"
        assert inspected["stock"].get(name) == expected, f"stock DCP reads something else from {name} {when}"
    hidden = {name: found for name, found in inspected["stock"].items() if name not in answer}
    assert hidden == {}, f"a .metadata that the package does not list {when}"
    return answer
