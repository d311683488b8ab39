"""Whatever code that is not ours raises inside a verb comes out as an error of the tree, with the name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException

from dcp_async import (
    CheckpointEngine,
    CheckpointError,
    IncompatibleStateError,
    LoadError,
    SaveError,
    StorageError,
    Trust,
)
from dcp_async.planning.planner import PlanningOptions
from tests.support.doubles import FaultyStorage


class Odd(BaseException):
    """Derives from no Exception, as DCP's does."""


class Mute(Exception):
    """Can't even be told."""

    def __str__(self) -> str:
        raise TypeError("no words")


ERRORS: dict[str, Callable[..., BaseException]] = {
    "AttributeError": lambda: AttributeError("no such thing"),
    "KeyError": lambda: KeyError("gone"),
    "RecursionError": lambda: RecursionError("too deep"),
    "AssertionError": AssertionError,
    "StopIteration": lambda: StopIteration("no more"),
    "MemoryError": lambda: MemoryError("too much"),
    "CheckpointException": lambda: CheckpointException("theirs", {}),
    "BaseException": lambda: Odd("odd"),
    "Mute": Mute,
}
every_error = pytest.mark.parametrize("error", ERRORS)


class Fills(torch.Tensor):
    """A tensor that can't be copied to."""

    error: str | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and cls.error:
            raise ERRORS[cls.error]()  # noqa: RSE102  # some are made by a function
        default: Any = super().__torch_function__  # torch has no annotation
        return default(func, types, args, kwargs or {})


@pytest.mark.parametrize("atomic", [False, True])
@every_error
async def test_a_target_that_will_not_be_filled_is_named(
    root: Path, error: str, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = Trust(safe_globals=(Fills,))
    async with CheckpointEngine(root, trust=trust) as engine:
        await engine.save({"a": torch.ones(2), "deep": {"odd": torch.ones(3).as_subclass(Fills)}})
        await engine.wait()
        state = {"a": torch.zeros(2), "deep": {"odd": torch.zeros(3).as_subclass(Fills)}}
        monkeypatch.setattr(Fills, "error", error)
        # an atomic load reads into others of its kind first
        said = "nothing was loaded" if atomic else "targets are partly overwritten"
        with pytest.raises(LoadError, match=rf"(?s)deep\.odd.*{said}") as caught:
            await engine.load(state, atomic=atomic)
    assert type(caught.value) is LoadError, "nothing is corrupt"
    assert error.replace("BaseException", "Odd") in str(caught.value)


class Live(MutableMapping[str, Any]):
    """A mapping that does what it is told."""

    def __init__(self, entries: dict[str, Any], *, setting: str = "", listing: str = "") -> None:
        self.entries, self.setting, self.listing = entries, setting, listing

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if self.setting:
            raise ERRORS[self.setting]()  # noqa: RSE102  # some are made by a function
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        if self.listing:
            raise ERRORS[self.listing]()  # noqa: RSE102  # some are made by a function
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@every_error
async def test_a_mapping_that_will_not_be_assigned_to_is_named(root: Path, error: str) -> None:
    async with CheckpointEngine(root) as engine:
        await engine.save({"deep": {"m": {"n": 1}}})
        await engine.wait()
        with pytest.raises(LoadError, match=r"overwritten already: deep\.m\.n: "):
            await engine.load({"deep": {"m": Live({"n": 0}, setting=error)}})


@every_error
async def test_a_mapping_that_can_not_be_looked_at_is_named(root: Path, error: str) -> None:
    weight = torch.zeros(2)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"deep\.m"):
            await engine.save({"w": weight, "deep": {"m": Live({"n": 0}, listing=error)}})
        await engine.save({"w": torch.ones(2), "deep": {"m": {"n": 1}}})
        await engine.wait()
        with pytest.raises(IncompatibleStateError, match=r"deep\.m"):
            await engine.load({"w": weight, "deep": {"m": Live({"n": 0}, listing=error)}})
    assert not weight.any()


class Raises:
    """A Stateful that fails where it is told to."""

    def __init__(self, asked: str = "", given: str = "") -> None:
        self.asked, self.given = asked, given
        self.weight = torch.ones(3)

    def state_dict(self) -> dict[str, Any]:
        if self.asked:
            raise ERRORS[self.asked]()  # noqa: RSE102  # some are made by a function
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.given:
            raise ERRORS[self.given]()  # noqa: RSE102  # some are made by a function


@every_error
async def test_a_stateful_that_fails_is_named(root: Path, error: str) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"deep\.thing: Raises\.state_dict\(\) failed"):
            await engine.save({"deep": {"thing": Raises(asked=error)}})
        await engine.save({"deep": {"thing": Raises()}})
        await engine.wait()
        with pytest.raises(IncompatibleStateError, match=r"deep\.thing: Raises\.state_dict\(\) failed"):
            await engine.load({"deep": {"thing": Raises(asked=error)}})
        with pytest.raises(LoadError, match=r"overwritten already: deep\.thing: "):
            await engine.load({"deep": {"thing": Raises(given=error)}})


class Leaf:
    """A leaf whose class has code of its own."""

    pickling = making = ""

    def __reduce__(self) -> Any:
        if Leaf.pickling:
            raise ERRORS[Leaf.pickling]()  # noqa: RSE102  # some are made by a function
        return Leaf, (), {"n": 1}

    def __setstate__(self, state: Any) -> None:
        if Leaf.making:
            raise ERRORS[Leaf.making]()  # noqa: RSE102  # some are made by a function


@every_error
async def test_a_leaf_that_can_not_be_pickled_or_made_is_named(
    root: Path, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.zeros(2)
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Leaf,), unsafe=True)) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Leaf, "pickling", error)
            with pytest.raises(SaveError, match=r"deep\.leaf"):
                await engine.save({"deep": {"leaf": Leaf()}})
        await engine.save({"w": torch.ones(2), "deep": {"leaf": Leaf()}})
        await engine.wait()
        monkeypatch.setattr(Leaf, "making", error)
        with pytest.raises(LoadError, match=r"deep\.leaf"):
            await engine.load({"w": weight, "deep": {"leaf": 0}})
        with pytest.raises(LoadError, match=r"deep\.leaf"):
            await engine.read()
    assert not weight.any()


@pytest.mark.parametrize("error", [error for error in ERRORS if error != "Mute"])
@pytest.mark.parametrize("hook", ["create_local_plan", "create_global_plan", "resolve_data"])
async def test_a_planner_that_fails_fails_the_save(root: Path, hook: str, error: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ERRORS[error]()  # noqa: RSE102  # some are made by a function

    planner = type("Planner", (DefaultSavePlanner,), {hook: fail})
    async with CheckpointEngine(root, planning=PlanningOptions(save=planner)) as engine:
        with pytest.raises(SaveError):
            await (await engine.save({"w": torch.ones(2)})).upload_completion
        assert await engine.latest() is None


@pytest.mark.parametrize(
    "error", [error for error in ERRORS if error != "MemoryError"]
)  # it may be anybody's
@pytest.mark.parametrize("verb", ["list", "open", "read_into", "metadata", "manifest"])
async def test_a_storage_that_fails_fails_each_verb_as_one(
    faulty: FaultyStorage, verb: str, error: str
) -> None:
    async with CheckpointEngine(faulty) as engine:
        await engine.save({"w": torch.ones(2)})
        await engine.wait()
        faulty.fail(verb, ERRORS[error]())
        verbs: dict[str, Callable[[], Any]] = {
            "load": lambda: engine.load({"w": torch.zeros(2)}),
            "read": engine.read,
            "latest": engine.latest,
            "checkpoints": lambda: anext(engine.checkpoints()),
        }
        for name, call in verbs.items():
            if verb == "read_into" and name in ("latest", "checkpoints"):
                continue
            with pytest.raises(CheckpointError) as caught:
                await call()
            assert isinstance(caught.value, (StorageError, LoadError)), name
        faulty.heal()


@pytest.mark.parametrize("error", [e for e in ERRORS if e not in ("StopIteration", "MemoryError")])
async def test_a_storage_that_can_not_be_opened_fails_open(faulty: FaultyStorage, error: str) -> None:
    faulty.fail("list", ERRORS[error]())
    with pytest.raises(StorageError):
        await CheckpointEngine(faulty).open()


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
async def test_what_ends_a_program_stays_itself(root: Path, ending: type[BaseException]) -> None:
    class Ends(Raises):
        at = ""

        def state_dict(self) -> dict[str, Any]:
            if self.at == "state_dict":
                raise ending
            return super().state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise ending

    async with CheckpointEngine(root) as engine:
        await engine.save({"thing": Raises()})
        await engine.wait()
        thing = Ends()
        with pytest.raises(ending):
            await engine.load({"thing": thing})
        thing.at = "state_dict"
        with pytest.raises(ending):
            await engine.load({"thing": thing})
        with pytest.raises(ending):
            await engine.save({"thing": thing})
        await engine.load({"thing": Raises()})
