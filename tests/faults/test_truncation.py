"""A file of a checkpoint that ends too early, wherever it ends, is told, and a load takes the one before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointError, sync
from tests.faults.states import flat, numbers

BLOCK = 64 << 10
SAMPLE = 25


def interesting_ends(path: Path) -> list[tuple[Path, int]]:
    """(file, length to cut it to): none, a byte, all but one, around each tensor's edges, pages and blocks of
    checksums."""
    stored = dcp.FileSystemReader(path).read_metadata().storage_data.values()
    edges: dict[str, set[int]] = {}
    for info in stored:
        edges.setdefault(info.relative_path, set()).update((info.offset, info.offset + info.length))
    found = []
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        near = edges.get(file.name, set()) | {0, 4096, size} | set(range(BLOCK, size, BLOCK))
        ends = {edge + off for edge in near for off in (-1, 0, 1)} | {size // 2}
        found += [(file, end) for end in sorted(ends) if 0 <= end < size]
    return found


def test_file_that_ends_too_early_is_told_and_passed_over(
    root: Path, kills: int, tell: Callable[[object], None]
) -> None:
    wanted = {version: flat(numbers(version)) for version in (1, 2)}
    with sync.CheckpointEngine(root) as engine:
        for version in wanted:
            engine.save(numbers(version), step=version).upload_completion.result()
        ends = interesting_ends(root / "step-00000002")
        if kills < 50:
            ends = random.Random(kills).sample(ends, SAMPLE)
        for file, end in ends:
            where = f"{file.name} of {file.stat().st_size} bytes, cut to {end}"
            content = file.read_bytes()
            file.write_bytes(content[:end])
            try:
                told = not engine.verify("step-00000002").ok
            except CheckpointError:
                told = True
            assert told, where
            target = numbers(-1)
            report = engine.load(target)
            # what the format can do without is told by verify alone
            assert report.step == (1 if report.skipped else 2), where
            assert flat(target) == wanted[report.step], where
            if file.suffix == ".distcp":
                assert report.step == 1, where
            file.write_bytes(content)
        assert engine.verify("step-00000002").ok
    tell(f"{len(ends)} truncations")
