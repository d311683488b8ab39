"""Whatever a file holds, what comes out is an object or an error of ours: no crash, no hang, no memory."""

from __future__ import annotations

import base64
import collections
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.batch import LOADED, REFUSED, Case, run_cases
from tests.fuzz.generate import generated, mutated
from tests.fuzz.models import changed_model, honest_models

SEEDS = Path(__file__).parent / "escapes.json"
"""Cases that escaped once: verb, base64 of the bytes, and what happened."""


def _check(cases: list[Case], seed: object, capsys: pytest.CaptureFixture[str]) -> None:
    ends = run_cases(cases)
    counts = collections.Counter(ends)
    with capsys.disabled():
        sys.stdout.write(f"\n{len(cases)} cases of seed {seed}: {dict(counts)}\n")
    escapes = [
        f"{verb}: {end}: {_encoded(content)}"
        for (verb, content), end in zip(cases, ends, strict=True)
        if end not in (LOADED, REFUSED)
    ]
    assert not escapes, "\n".join(escapes[:8])


def _encoded(content: bytes | dict[str, bytes]) -> str:
    """As escapes.json holds it."""
    return base64.b64encode(content if isinstance(content, bytes) else pickle.dumps(content)).decode()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("make", [mutated, generated])
def test_files_of_unknown_origin_are_read_or_refused(
    make: Callable[[Random, int], Iterator[Case]],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = request.config.getoption("--fuzz-seed", 0)
    count = request.config.getoption(f"--{make.__name__}", 100)
    _check(list(make(Random(f"{make.__name__} {seed}"), count)), seed, capsys)


@pytest.mark.timeout(3600)
def test_safetensors_files_of_unknown_origin_are_read_or_refused(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = request.config.getoption("--fuzz-seed", 0)
    random = Random(f"models {seed}")
    # every one is opened, by four verbs: half as many as of single files
    count = request.config.getoption("--mutated", 100) // 2
    assert set(run_cases([("model", files) for files in honest_models()])) == {LOADED}
    _check([("model", changed_model(random)) for _ in range(count)], seed, capsys)


def test_what_escaped_once_is_refused_now() -> None:
    found = [(entry["verb"], base64.b64decode(entry["bytes"])) for entry in json.loads(SEEDS.read_text())]
    cases: list[Case] = [
        (verb, pickle.loads(raw) if verb in ("checkpoint", "model") else raw) for verb, raw in found
    ]
    assert set(run_cases(cases)) <= {REFUSED, LOADED}
