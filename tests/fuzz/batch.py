"""Runs what reads bytes of unknown origin over many of them, in processes that may die.

In: cases, each a verb and its bytes. Out: how each ended. One process forks a child, which takes case
after case under a limit of address space (what it has, the bytes, and 256 MiB) and of processor time; after
one that kills it comes the next child.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import pickle
import resource
import signal
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import run_in_process

SECONDS = 10
EXTRA_BYTES = 256 << 20
M_ARENA_MAX = -8
"""Of mallopt(3)."""
REFUSED, LOADED, ESCAPED = "refused", "loaded", "escaped"
"""By an error of the tree or of the decoder; without one; by any other. A child's death is told in words."""

Case = tuple[str, Any]
"""(verb, bytes; of a checkpoint or a model, file name -> bytes)."""


def run_cases(cases: Sequence[Case], *, patience: float = 3600) -> list[str]:
    """How each of ``cases`` ended, in their order."""
    with tempfile.TemporaryDirectory() as scratch:
        given, told = Path(scratch, "cases"), Path(scratch, "ends")
        given.write_bytes(pickle.dumps(list(cases)))
        run_in_process(_run, given, told, patience=patience)
        ends = told.read_text().splitlines()
    assert len(ends) == len(cases)
    return ends


def _verbs() -> dict[str, tuple[Callable[[Any], object], tuple[type[BaseException], ...]]]:
    """What is run, and the errors that it may raise."""
    import torch  # here, so that the other side of a run need not import it

    from dcp_async import CheckpointError, sync
    from dcp_async.formats.distcp import Footer, FooterError
    from dcp_async.formats.manifest import decode_manifest
    from dcp_async.formats.manifest_fields import ManifestError
    from dcp_async.formats.metadata_reader import decode_metadata
    from dcp_async.formats.stored_item import StoredItem, check_records, pickle_start
    from dcp_async.formats.tree import build, leaf_names, pickled_keys
    from dcp_async.formats.tree_json import tree_from_json
    from dcp_async.trust import Trust, UntrustedGlobal, load_pickle
    from dcp_async.trust.plain_data import loads

    trust = Trust()

    def use(value: object) -> None:
        """What any program does with what it loaded."""
        repr(value)
        if (
            isinstance(value, torch.Tensor)
            and value.layout is torch.strided
            and not value.is_nested
            and not value.is_quantized
        ):
            value.clone()

    def item(raw: bytes) -> None:
        found = StoredItem(
            name="x", file="f", offset=0, length=len(raw), descriptors=(), max_bytes=len(raw),
            has_digests=False, trust=trust,
        )  # fmt: skip
        found.judge(bytearray(raw[: found.head_bytes]))
        use(found.decode(bytearray(raw)))

    def manifest(raw: bytes) -> None:
        found = decode_manifest(raw)
        repr(
            (
                found.files,
                found.strides,
                found.exotic,
                found.time + 1,
                found.step,
                found.checkpoint_id.encode(),
            )
        )
        tree = tree_from_json(found.structure)
        leaf_names(tree)
        pickled_keys(tree)
        build(tree, str, lambda key: key.plain if key.raw is None else load_pickle(key.raw, trust))

    def call_all(*verbs: Callable[[], object]) -> None:
        """Call each of ``verbs``, whatever the others raise. Raises the last error of the tree."""
        errors = []
        for verb in verbs:
            try:
                verb()
            except CheckpointError as error:
                str(error).encode("utf-8", "backslashreplace")
                errors.append(error)
        if errors:
            raise errors[-1]

    def attached(engine: sync.CheckpointEngine) -> None:
        with engine.checkpoint() as opened:
            repr([opened.file(name) for name in opened.files])

    def checkpoint(files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch, "step-00000001")
            place.mkdir()
            for name, content in files.items():
                (place / name).write_bytes(content)
            with sync.CheckpointEngine(scratch) as engine:
                call_all(
                    engine.latest,
                    lambda: [repr(info) for info in engine.checkpoints()],
                    lambda: engine.load({"model": {"w": torch.zeros(8, 8), "b": torch.zeros(8)}, "n": 1}, 1),
                    lambda: use(engine.read()),
                    lambda: attached(engine),
                    engine.verify,
                )

    def model(files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch, "model")
            place.mkdir()
            for name, content in files.items():
                (place / name).write_bytes(content)
            with sync.CheckpointEngine(Path(scratch, "own")) as engine:
                call_all(
                    lambda: use(engine.read(place)),
                    lambda: use(engine.read(place, dequantize=torch.bfloat16)),
                    lambda: engine.load({"w": torch.zeros(8, 8)}, place, dequantize=torch.float32),
                    lambda: repr(engine.verify(place)),
                )

    decoding = (UntrustedGlobal, ValueError)
    return {
        "leaf": (lambda raw: use(load_pickle(raw, trust)), decoding),
        "metadata": (decode_metadata, decoding),
        "message": (lambda raw: repr(loads(raw)), (ValueError,)),
        "item": (item, decoding),
        "zip": (lambda raw: check_records(memoryview(raw), crcs=bool(pickle_start(raw))), (ValueError,)),
        "manifest": (manifest, (ManifestError, *decoding)),
        "footer": (lambda raw: Footer.decode(raw, len(raw) + 4096 * 16), (FooterError,)),
        "checkpoint": (checkpoint, (CheckpointError,)),
        "model": (model, (CheckpointError,)),
    }


def _run_from(cases: Sequence[Case], start: int, verbs: Any, out: int) -> None:
    """In a child: from case ``start`` on, a line for each. Dies by a signal, or comes to the end."""
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    for verb, content in cases[start:]:
        nbytes = sum(map(len, content.values())) if isinstance(content, dict) else len(content)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + nbytes + EXTRA_BYTES, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        run, allowed = verbs[verb]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run(content)
            end = LOADED
        except allowed:
            end = REFUSED
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in where if "dcp_async" in frame.filename] or where
            end = f"{ESCAPED} by {type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        os.write(out, end.encode() + b"\n")


def _run(given: Path, told: Path) -> None:
    """In a process of its own."""
    # threads reserve address space that they never use
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    threading.stack_size(1 << 20)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    cases = pickle.loads(given.read_bytes())
    verbs = _verbs()
    out = os.open(told, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    done = 0
    while done < len(cases):
        pid = os.fork()
        if pid == 0:
            _run_from(cases, done, verbs, out)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        done = told.read_bytes().count(b"\n")
        if done < len(cases):
            died = signal.Signals(-status).name if status < 0 else f"exit {status}"
            os.write(out, f"died by {died}\n".encode())
            done += 1
