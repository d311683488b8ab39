"""Code of the trainer's that hangs inside of a verb is named by the ranks that wait for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.harness import World

SHORT = 2.0


@pytest.mark.parametrize(
    ("verb", "method", "kind", "hanging"),
    [
        ("save", "state_dict", "Stuck", 1),
        ("save", "state_dict", "Stuck", 0),
        ("save", "__reduce__", "StuckLeaf", 1),
        ("load", "state_dict", "Stuck", 1),
        ("load", "load_state_dict", "Stuck", 1),
        ("load", "load_state_dict", "Stuck", 0),
    ],
)
def test_a_rank_that_hangs_in_a_method_is_named_with_it(
    pair: World, root: Path, tmp_path: Path, verb: str, method: str, kind: str, hanging: int
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    opened = pair.all("replica_engine", root=str(root), coordination=SHORT)
    assert opened == [{"kind": "open"}] * 2
    pair.all("hold_stuck", pipe=str(pipe), method="")
    if verb == "load":
        assert {each["kind"] for each in pair.all("save", step=1)} == {"committed"}
    pair[hanging].do("hold_stuck", pipe=str(pipe), method=method)
    calls = pair.begin(verb, step=2) if verb == "save" else pair.begin(verb)
    outcome = calls[1 - hanging].result()
    assert outcome["kind"] == ("SaveError" if verb == "save" else "LoadError")
    assert f"rank {hanging}" in outcome["text"]
    assert f"is in {kind}.{method}() of 'stuck' since " in outcome["text"]
    assert not calls[hanging].done()
    pipe.open("wb").close()  # lets it go on
    assert calls[hanging].result()["kind"] == outcome["kind"]
    pair.all("hold_stuck", pipe=str(pipe), method="")
    assert {each["kind"] for each in pair.all("save", step=3)} == {"committed"}
    pair.all("finish_engine")
