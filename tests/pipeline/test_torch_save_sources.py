"""Files of torch.save are read like a checkpoint: parts of them, into a state, under a Trust."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_async import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    Trust,
    UntrustedCheckpointError,
    functional,
    open_checkpoint,
    verify,
)
from tests.support.doubles import assert_same, flip


class Scaled:
    """An object that holds tensors."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.parts = [weight.t(), {"half": weight[1:]}]


def state_of_all_kinds() -> dict[str, Any]:
    weight = torch.randn(30, 70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    return {
        "model": OrderedDict(
            a=weight,
            tied=weight,
            rows=weight[3:5],
            flat=weight.view(-1),
            turned=torch.randn(50, 40).t(),
            gaps=weight[:, :5],
            expanded=torch.ones(1).expand(4),
            conjugate=torch.tensor([1 + 2j, 3]).conj(),
            parameter=torch.ones(3),
        ),
        "kinds": {
            str(dtype): torch.ones(5, dtype=dtype)
            for dtype in (torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16)
        },
        "plain": {7: [1, "x", {}, None], (1, 2): "text", None: b"raw"},
        "by default": defaultdict(list, {"x": [1]}),
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(0, 5),
        "sparse": torch.eye(4).to_sparse(),
        "quantized": quantized,
        "tuple": (weight[0], 1, {"inner": torch.ones(2)}),
        "optim": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0, 1], "lr": 0.1}]},
    }


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # as torch.load gives it
@pytest.mark.parametrize("is_zip", [True, False])
async def test_what_was_saved_is_read(tmp_path: Path, is_zip: bool) -> None:
    state, path = state_of_all_kinds(), tmp_path / "all.pt"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    async with open_checkpoint(path) as checkpoint:
        loaded = await checkpoint.read()
        assert_same(loaded, state)
        assert loaded["model"]["a"] is loaded["model"]["tied"]
        assert loaded["model"]["turned"].stride() == (1, 40)
        assert type(loaded["model"]) is OrderedDict
        assert checkpoint.info.producer == "torch.save"
        part = await checkpoint.tensor("model.a", (slice(2, 4), slice(10, 20, 3)))
        assert torch.equal(part, state["model"]["a"][2:4, 10:20:3])
        turned = await checkpoint.tensor("model.turned", (slice(2, 4),))
        assert torch.equal(turned, state["model"]["turned"][2:4])
        streamed = {name: tensor async for name, tensor in checkpoint.stream("model.*", budget_bytes=1 << 10)}
        assert_same(streamed["model.turned"], state["model"]["turned"])
        assert await checkpoint.read(["plain"]) == {"plain": state["plain"]}


async def test_objects_that_are_trusted_keep_their_tensors(tmp_path: Path) -> None:
    value, path = Scaled(torch.randn(4, 3)), tmp_path / "object.pt"
    torch.save({"scaled": value, "w": torch.ones(2)}, path)
    with pytest.raises(UntrustedCheckpointError, match=r"names tests.*Scaled.*safe_globals=\(Scaled,\)"):
        async with open_checkpoint(path):
            pass
    for trust in (Trust(safe_globals=(Scaled,)), Trust(unsafe=True)):
        async with open_checkpoint(path, trust=trust) as checkpoint:
            loaded = await checkpoint.read()
            assert_same(vars(loaded["scaled"]), vars(value))


@pytest.mark.parametrize("rename", [None, {"*": "model.*"}])
async def test_a_models_weights_are_loaded(tmp_path: Path, rename: dict[str, str] | None) -> None:
    saved, target = nn.Linear(7, 5), nn.Linear(7, 5)
    path = tmp_path / "model.pt"
    torch.save(saved.state_dict() if rename else {"model": saved.state_dict()}, path)
    async with open_checkpoint(path) as checkpoint:
        await checkpoint.load({"model": target}, rename=rename)
    assert_same(target.state_dict(), saved.state_dict())


async def test_dcps_load_takes_a_file(tmp_path: Path) -> None:
    model, optim = nn.Linear(7, 5), None
    optim = torch.optim.AdamW(model.parameters())
    model(torch.ones(7)).sum().backward()
    optim.step()
    path = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "step": 7, "w": torch.ones(3, dtype=torch.float16)}, path)
    state: dict[str, Any] = {"model": nn.Linear(7, 5).state_dict(), "step": 0, "w": torch.zeros(3)}
    await functional.load(state, checkpoint_id=path, no_dist=True)
    assert_same(state["model"], dict(model.state_dict()))
    assert state["step"] == 7
    assert torch.equal(state["w"], torch.ones(3))


@pytest.mark.parametrize("is_zip", [True, False])
async def test_no_more_is_read_than_was_asked_for(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "large.pt"
    state = {str(index): torch.full((1 << 20,), index, dtype=torch.float32) for index in range(8)}
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    async with open_checkpoint(path) as checkpoint:
        await checkpoint.tensor("0", (slice(1),))
        before = read_bytes()
        tensor = await checkpoint.tensor("5")
        assert read_bytes() - before < tensor.nbytes + (1 << 20)
        assert torch.equal(tensor, torch.full((1 << 20,), 5.0))


async def test_views_and_empty_tensors_at_one_place_keep_their_shapes(tmp_path: Path) -> None:
    weight, path = torch.arange(12.0), tmp_path / "views.pt"
    state = {"w": weight, "matrix": weight.view(3, 4), "none": weight[12:]}
    torch.save(state, path)
    async with open_checkpoint(path) as checkpoint:
        assert_same(await checkpoint.read(), state)


async def test_verify_tells_a_flipped_bit_by_the_files_own_checksums(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(100_000)}, path)
    assert (await verify(path)).damage == ()
    flip(path, 200_000)
    report = await verify(path)
    assert report.producer == "torch.save"
    assert "does not match its CRC-32" in report.damage[0].reason


async def test_verify_says_of_the_older_format_that_nothing_vouches_for_it(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(100_000)}, path, _use_new_zipfile_serialization=False)
    report = await verify(path)
    assert report.damage == ()
    assert report.unrecorded
    assert report.nbytes == path.stat().st_size


# --- what can't be read


def archive(path: Path, pickled: bytes, storages: dict[str, bytes], **others: bytes) -> None:
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {
            "data.pkl": pickled,
            "byteorder": b"little",
            "version": b"3\n",
            **others,
        }.items():
            file.writestr(f"archive/{name}", content)
        for key, content in storages.items():
            file.writestr(f"archive/data/{key}", content)


class Calls:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Restored:
    """Runs code of its own when it is given its state."""

    def __setstate__(self, state: Any) -> None:
        os.mkdir(state["path"])

    def __getstate__(self) -> Any:
        return {"path": ran}


ran = ""
"""What a payload makes if it runs."""


def tensor_and(function: Callable[..., Any]) -> Any:
    """A call with a tensor, whose bytes are not there when it is met."""
    return Calls(function, ran, 0o777, torch.ones(2))


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    "payload",
    [
        lambda: Calls(os.mkdir, ran),
        lambda: tensor_and(os.mkdir),
        lambda: Restored(),
        lambda: Calls(eval, f"__import__('os').mkdir({ran!r})"),
        lambda: Calls(getattr, "", "join"),
        lambda: OrderedDict(x=Calls(os.mkdir, ran)),
    ],
    ids=["call", "call with a tensor", "state", "eval", "getattr", "in a container"],
)
async def test_a_payload_is_refused_and_does_not_run(
    tmp_path: Path, payload: Callable[[], Any], is_zip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ran", str(tmp_path / "ran"))
    path = tmp_path / "bad.pt"
    torch.save({"w": torch.ones(2), "payload": payload()}, path, _use_new_zipfile_serialization=is_zip)
    target = {"w": torch.zeros(2)}
    with pytest.raises(UntrustedCheckpointError, match="nothing of it was run"):
        await functional.load(target, checkpoint_id=path, no_dist=True)
    with pytest.raises(UntrustedCheckpointError, match="nothing of it was run"):
        async with open_checkpoint(path) as checkpoint:
            await checkpoint.read()
    assert not (tmp_path / "ran").exists()
    assert torch.equal(target["w"], torch.zeros(2))


async def test_a_program_is_refused(tmp_path: Path) -> None:
    program = {"constants.pkl": b"", "code/x.py": b""}
    archive(tmp_path / "script.pt", pickle.dumps({}, protocol=2), {}, **program)
    with pytest.raises(UntrustedCheckpointError, match="TorchScript"):
        async with open_checkpoint(tmp_path / "script.pt"):
            pass


def storage_pickle(numel: int, offset: int = 0, shape: str = "(I4\nt", key: bytes = b"0") -> bytes:
    """A dict of one tensor, written opcode by opcode."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX" + len(key).to_bytes(4, "little") + key
    storage += b"X\3\0\0\0cpuI%d\ntQ" % numel
    args = (
        b"("
        + storage
        + b"I%d\n" % offset
        + shape.encode()
        + b"(I1\nt"
        + b"I00\nccollections\nOrderedDict\n)Rt"
    )
    return b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + args + b"Rs."


async def test_a_file_made_by_hand_is_read(tmp_path: Path) -> None:
    """So that the next test fails for what it says."""
    archive(tmp_path / "hand.pt", storage_pickle(4), {"0": bytes(16)})
    async with open_checkpoint(tmp_path / "hand.pt") as checkpoint:
        assert_same(await checkpoint.read(), {"w": torch.zeros(4)})


def in_each_other() -> bytes:
    state: dict[str, Any] = {}
    state["x"] = {"y": state}
    return pickle.dumps(state, protocol=2)


def laughs() -> bytes:
    state: list[Any] = [{}]
    for _ in range(12):
        state = [state] * 10
    return pickle.dumps({"x": state}, protocol=2)


@pytest.mark.parametrize(
    ("pickled", "storages", "error"),
    [
        (storage_pickle(5), {"0": bytes(16)}, "another length"),
        (storage_pickle(4, key=b"1"), {"0": bytes(16)}, "another length"),
        (storage_pickle(4, offset=1), {"0": bytes(16)}, "outside of its storage"),
        (storage_pickle(4, shape="(I5\nt"), {"0": bytes(16)}, "outside of its storage"),
        (storage_pickle(4, shape="(I-4\nt"), {"0": bytes(16)}, "unusual size"),
        (storage_pickle(4)[:-20], {"0": bytes(16)}, "damaged"),
        (b"", {}, "damaged"),
        (in_each_other(), {}, "without end|refer to each other"),
        (laughs(), {}, "too many times"),
    ],
)
async def test_a_file_that_lies_is_refused(
    tmp_path: Path, pickled: bytes, storages: dict[str, bytes], error: str
) -> None:
    archive(tmp_path / "bad.pt", pickled, storages)
    with pytest.raises((CorruptCheckpointError, UntrustedCheckpointError), match=error):
        async with open_checkpoint(tmp_path / "bad.pt"):
            pass


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.ones(3), "holds a Tensor, not a dict"),
        ([torch.ones(3)], "holds a list, not a dict"),
        ({1: torch.ones(3)}, "keys must be str"),
        ({"a.b": torch.ones(3), "a": {"b": torch.ones(1)}}, "two of its entries are named 'a.b'"),
    ],
)
async def test_what_no_checkpoint_could_hold_is_told(tmp_path: Path, value: Any, error: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(LoadError, match=error):
        async with open_checkpoint(tmp_path / "x.pt"):
            pass


async def test_files_of_other_formats_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    async def error_of(kind: type[CheckpointError]) -> str:
        with pytest.raises(kind) as caught:
            async with open_checkpoint(path):
                pass
        return str(caught.value)

    assert "no checkpoint" in await error_of(CheckpointNotFoundError)
    old = io.BytesIO()
    torch.save({"w": torch.ones(1000)}, old, _use_new_zipfile_serialization=False)
    for nbytes in (3000, 40):
        path.write_bytes(old.getvalue()[:nbytes])
        assert "damaged" in await error_of(CorruptCheckpointError)
    one = io.BytesIO()
    torch.save(1, one, _use_new_zipfile_serialization=False)
    head = one.getvalue().removesuffix(pickle.dumps([], 2)).removesuffix(pickle.dumps(1, 2))
    for pickled in (b"\x80\2ctorch\nSize\nNR.", b"\x80\2(.", b"\x80\2h\7."):
        path.write_bytes(head + pickled + pickle.dumps([], 2))
        assert "damaged" in await error_of(CorruptCheckpointError)
    # the number of elements that stands before them
    path.write_bytes(old.getvalue().replace((1000).to_bytes(8, "little"), (999).to_bytes(8, "little")))
    assert "shorter than its storages" in await error_of(CorruptCheckpointError)
    for content in (b"", b"text", b"PK\3\4" + bytes(100)):
        path.write_bytes(content)
        assert "no file of torch.save's" in await error_of(CorruptCheckpointError)
    archive(path, pickle.dumps({}, protocol=2), {}, byteorder=b"big")
    assert "byte order" in await error_of(LoadError)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({"x": "x" * 1000}, protocol=2))
    assert "compressed" in await error_of(CorruptCheckpointError)
    whole = io.BytesIO()
    torch.save({"w": torch.ones(1000)}, whole)
    path.write_bytes(whole.getvalue()[:3000])
    assert "cut off" in await error_of(CorruptCheckpointError)
