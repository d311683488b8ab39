"""Any state comes back bit for bit: by `read`, by `load`, by stock's load, and from what stock saved.

What stock can't, and what is therefore not asked of it (states.py says where): its save refuses tensors of
bits8 and its kin, sparse and nested ones; it pickles Statefuls below the top whole; its load puts a leaf at
an int key beside it, leaves a quantized target's scale as it is, and knows no mapping but dicts, and fails
at an empty mapping in a list; an empty mapping leaves no trace in what it saves, all others come back as
dicts; tied tensors are stored once for each name.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given

from dcp_async import IncompatibleStateError, StagingOptions, Trust, sync
from tests.property.states import (
    TRUSTED,
    Holder,
    Marked,
    Quiet,
    State,
    assert_same,
    is_plain,
    pairs_of,
    pictured,
    states,
    stock_states,
    tie_difference,
)
from tests.support.doubles import MIB, PATIENCE
from tests.support.saves import PART

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
    pytest.mark.filterwarnings("ignore:Generating overly large repr"),  # of the strategies, in errors
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

OPTIONS = st.builds(
    lambda overlap, budget, parts: StagingOptions(
        overlap=overlap,
        part_bytes=parts * PART,
        budget_bytes=None if budget is None else budget * parts * PART + (8 * MIB if overlap else 0),
    ),
    st.booleans(),
    st.none() | st.integers(1, 3),
    st.integers(1, 2),
)


@contextlib.contextmanager
def fresh_engine(
    workplace: Path, options: StagingOptions = StagingOptions()
) -> Iterator[tuple[sync.CheckpointEngine, Path]]:
    """An engine and its root, new for each case: a plan that one case left behind must not serve the next."""
    with (
        tempfile.TemporaryDirectory(dir=workplace) as name,
        sync.CheckpointEngine(name, staging=options, trust=Trust(safe_globals=TRUSTED)) as engine,
    ):
        yield engine, Path(name)


def save(engine: sync.CheckpointEngine, state: Mapping[str, Any]) -> str:
    response = engine.save(state)
    response.staging_completion.result(PATIENCE)
    return response.upload_completion.result(PATIENCE).checkpoint_id


def plain_tensors(state: Any) -> list[torch.Tensor]:
    picture = pictured(state)
    return [tensor for tensor, _ in pairs_of(picture, picture) if is_plain(tensor)]


def without_holders(value: Any) -> Any:
    """What a load fills in place whatever happens: an object of one's own takes what it is given."""
    if isinstance(value, Holder):
        return None
    if isinstance(value, Mapping):
        return {key: without_holders(entry) for key, entry in value.items()}
    return [without_holders(entry) for entry in value] if isinstance(value, list) else value


def save_with_stock(state: dict[str, Any], path: Path) -> None:
    dcp.save(state, checkpoint_id=path, no_dist=True)


def load_with_stock(state: dict[str, Any], path: Path) -> None:
    with torch.serialization.safe_globals(list(TRUSTED)):  # its tensors are read with weights_only
        dcp.load(state, checkpoint_id=path, no_dist=True)


@given(recipe=states(), options=OPTIONS)
def test_read_gives_back_what_was_saved(workplace: Path, recipe: State, options: StagingOptions) -> None:
    state = recipe.build()
    with fresh_engine(workplace, options) as (engine, _):
        save(engine, state)
        found = engine.read()
    saved = pictured(state)
    assert_same(saved, found)
    assert tie_difference(saved, found) is None


@given(recipe=states(), options=OPTIONS, atomic=st.booleans())
def test_load_fills_a_target_of_the_same_structure_in_place(
    workplace: Path, recipe: State, options: StagingOptions, atomic: bool
) -> None:
    state, target = recipe.build(), recipe.build(1, target=True)
    places = [(tensor, tensor.data_ptr()) for tensor in plain_tensors(without_holders(target))]
    with fresh_engine(workplace, options) as (engine, _):
        save(engine, state)
        report = engine.load(target, atomic=atomic)
    assert_same(pictured(state), pictured(target))
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    now = [tensor.data_ptr() for tensor in plain_tensors(without_holders(target))]
    assert now == [place for _, place in places]


@given(recipe=stock_states(for_its_load=True), options=OPTIONS)
def test_stock_loads_what_was_saved(workplace: Path, recipe: State, options: StagingOptions) -> None:
    state, target = recipe.build(), recipe.build(1, target=True)
    with fresh_engine(workplace, options) as (engine, root):
        name = save(engine, state)
        load_with_stock(target, root / name)
    assert_same(pictured(state), pictured(target))


@given(recipe=stock_states())
def test_what_stock_saved_is_read(workplace: Path, recipe: State) -> None:
    state = recipe.build()
    with fresh_engine(workplace) as (engine, root):
        save_with_stock(state, root / "stock")
        found = engine.read("stock") if state else {}
    assert_same(as_stock_keeps(pictured(state)), found)


@given(recipe=stock_states(), atomic=st.booleans())
def test_what_stock_saved_is_loaded(workplace: Path, recipe: State, atomic: bool) -> None:
    state, target = recipe.build(), recipe.build(1, target=True)
    with fresh_engine(workplace) as (engine, root):
        save_with_stock(state, root / "stock")
        engine.load(target, "stock", atomic=atomic)
    assert_same(pictured(state), pictured(target))


@given(first=states(), second=states(), options=OPTIONS)
def test_later_saves_reuse_the_plan_or_make_another(
    workplace: Path, first: State, second: State, options: StagingOptions
) -> None:
    states = [first.build(), first.build(1), first.build(2), second.build(), first.build()]
    with fresh_engine(workplace, options) as (engine, _):
        names = [save(engine, state) for state in states]
        for name, state in zip(names, states, strict=True):
            saved, found = pictured(state), engine.read(name)
            assert_same(saved, found)
            assert tie_difference(saved, found) is None


@given(recipe=states(), options=OPTIONS)
def test_a_save_keeps_the_values_of_its_moment(
    workplace: Path, recipe: State, options: StagingOptions
) -> None:
    state, picture = recipe.build(), recipe.build()
    with fresh_engine(workplace, options) as (engine, _):
        response = engine.save(state)
        response.staging_completion.result(PATIENCE)
        for tensor in plain_tensors(state):
            overwrite(tensor)
        response.upload_completion.result(PATIENCE)
        assert_same(pictured(picture), engine.read())


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "bsc"])
@pytest.mark.parametrize("atomic", [False, True])
def test_a_compressed_target_with_room_for_fewer_elements_is_no_sign_of_damage(
    workplace: Path, kind: str, atomic: bool
) -> None:
    full = getattr(torch.ones(4, 4), f"to_sparse_{kind}")(*(((2, 2),) if kind in ("bsr", "bsc") else ()))
    empty = getattr(torch.zeros(4, 4), f"to_sparse_{kind}")(*(((2, 2),) if kind in ("bsr", "bsc") else ()))
    target = {"x": empty}
    with fresh_engine(workplace) as (engine, _):
        save(engine, {"x": full})
        with contextlib.suppress(IncompatibleStateError):  # torch can't copy into such a target
            engine.load(target, atomic=atomic)
            assert_same({"x": full}, target)


def overwrite(tensor: torch.Tensor) -> None:
    """Change every byte that `tensor` is a view of, and what else shares its memory."""
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
    memory.fill_(0x55)


def as_stock_keeps(value: Any) -> Any:
    """What of a state stock's files tell: no empty mapping, no kind of mapping, no key but its text."""
    kept = _kept(value)
    return {} if kept is _NOTHING else kept


_NOTHING = object()


def _is_terminal(value: Any) -> bool:
    """Whether stock pickles this value whole."""
    if isinstance(value, (Mapping, Holder)):
        return False
    if not isinstance(value, list):
        return True
    return all(_is_terminal(entry) and not isinstance(entry, torch.Tensor) for entry in value)


def _kept(value: Any) -> Any:
    if isinstance(value, Mapping):
        entries = {str(key): _kept(entry) for key, entry in value.items()}
        entries = {key: entry for key, entry in entries.items() if entry is not _NOTHING}
        return entries or _NOTHING
    if isinstance(value, list) and not _is_terminal(value):
        parts = [_kept(entry) for entry in value]
        while parts and parts[-1] is _NOTHING:
            parts.pop()
        return [{} if part is _NOTHING else part for part in parts] or _NOTHING
    if type(value) in (Marked, Quiet):
        return value.as_subclass(torch.Tensor)  # its .metadata does not tell of subclasses
    return value
