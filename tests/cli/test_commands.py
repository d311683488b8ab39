"""What each command prints and how it ends, on checkpoints of ours, of stock's and of Hugging Face's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from dcp_async.storage import MemoryStorage
from dcp_async.sync import CheckpointEngine, open_checkpoint, verify
from tests.cli.conftest import Run, make_state, names, step
from tests.support.doubles import data_files, flip, manifest_file


def test_ls_lists_all_of_a_root_in_order(run: Run, runs: Path) -> None:
    ran = run("ls", runs)
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [step(1), step(2), step(3), "stock-7"]
    assert "loss=0.5 tag=a b" in lines[2]
    assert lines[5].startswith("4 checkpoints, ")


def test_ls_as_json_tells_what_each_is(run: Run, runs: Path) -> None:
    (runs / "unfinished").mkdir()
    (runs / "unfinished" / "somebodys").touch()
    (runs / "newest").symlink_to(step(3))
    document = run("ls", runs, "--json", "--all").document
    first, *_, stock, newest, unfinished = document["checkpoints"]
    size = sum(file.stat().st_size for file in data_files(runs / step(1)))
    assert first["nbytes"] == size
    assert (first["step"], first["num_files"], first["world_size"]) == (1, 1, 1)
    assert first["notes"] == {"loss": 1.0, "tag": "a b"}
    assert (stock["producer"], stock["step"]) == ("stock", 7)
    assert newest["alias_of"] == step(3)
    assert not unfinished["committed"]


def test_ls_gives_the_last_ones(run: Run, runs: Path) -> None:
    assert names(run("ls", runs, "--last", "2", "--json").document["checkpoints"]) == [step(3), "stock-7"]


def test_ls_says_what_is_wrong_with_one(run: Run, runs: Path) -> None:
    manifest_file(runs / step(2)).unlink()
    ran = run("ls", runs)
    assert ran.status == 0
    assert "its manifest is missing" in ran.out
    assert names(run("ls", runs, "--json").document["checkpoints"]).index(step(2)) == 1


def test_ls_of_a_checkpoint_says_that_it_is_one(run: Run, runs: Path) -> None:
    assert "which is one itself" in run("ls", runs / step(1)).out


def test_show_tells_names_shapes_dtypes_and_notes(run: Run, runs: Path) -> None:
    document = run("show", runs / step(1), "--json").document
    (weight,) = [tensor for tensor in document["tensors"] if tensor["name"] == "model.w"]
    assert (weight["shape"], weight["dtype"], weight["nbytes"]) == ([300, 100], "float32", 120000)
    assert names(document["leaves"]) == ["epoch"]
    assert document["checkpoint"]["notes"] == {"loss": 1.0, "tag": "a b"}
    assert names(document["files"]) == [file.name for file in data_files(runs / step(1))]
    ran = run("show", runs / step(1), "--files")
    assert "300x100" in ran.out
    assert ran.out.splitlines()[-1] == "note tag    a b"


def test_attached_files_are_shown_copied_and_removed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / step(1)
    with CheckpointEngine(tmp_path) as engine:
        engine.save(make_state(), step=1, files={"config.json": b"{}"}).upload_completion.result()
    assert run("show", path, "--json").document["checkpoint"]["attached"] == {"config.json": 2}
    assert "file config.json  2 B" in run("show", path).out
    (path / "somebodys.txt").touch()
    assert "not read: somebodys.txt" in run("verify", path).out
    (path / "somebodys.txt").unlink()
    assert run("cp", path, tmp_path / "copy").status == 0
    assert (tmp_path / "copy" / "config.json").read_bytes() == b"{}"
    assert run("convert", path, tmp_path / "anew", "--to", "dcp").status == 0
    assert (tmp_path / "anew" / "config.json").read_bytes() == b"{}"
    assert run("rm", "--yes", path).status == 0
    assert not path.exists()


@pytest.mark.parametrize("pattern", ["model", "model.*", "*.w", "mod?l"])
def test_show_takes_patterns_as_load_does(run: Run, runs: Path, pattern: str) -> None:
    document = run("show", runs / "stock-7", pattern, "--json").document
    assert set(names(document["tensors"])) == ({"model.w"} if pattern == "*.w" else {"model.w", "model.b"})
    assert document["leaves"] == []


def test_show_of_a_pattern_that_matches_nothing_is_not_found(run: Run, runs: Path) -> None:
    ran = run("show", runs / step(1), "modle.*")
    assert ran.status == 3
    assert "'modle.*'" in ran.err


def test_show_and_verify_read_a_model_of_safetensors(run: Run, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 3), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    assert set(names(run("show", tmp_path, "--json").document["tensors"])) == {"a.weight", "b"}
    assert names(run("show", tmp_path / "model.safetensors", "a", "--json").document["tensors"]) == [
        "a.weight"
    ]
    ran = run("verify", tmp_path)
    assert ran.status == 0
    assert "nothing recorded a checksum" in ran.out


@pytest.mark.parametrize("name", [step(1), "stock-7"])
def test_verify_of_a_whole_checkpoint_ends_with_0(run: Run, runs: Path, name: str) -> None:
    ran = run("verify", runs / name)
    assert (ran.status, ran.err) == (0, "")
    assert f"{name}: whole" in ran.out


@pytest.mark.parametrize("name", [step(1), "stock-7"])
def test_verify_names_what_is_damaged_and_ends_with_1(run: Run, runs: Path, name: str) -> None:
    (file,) = data_files(runs / name)
    shown = run("show", runs / name, "--json").document
    (place,) = [tensor["chunks"][0] for tensor in shown["tensors"] if tensor["name"] == "model.w"]
    flip(file, place["start"] + place["stored_bytes"] // 2)
    ran = run("verify", runs / name)
    assert ran.status == 1
    assert "model.w" in ran.out
    assert f"{name}: damaged: 1 range in 1 file" in ran.out
    document = run("verify", runs / name, "--json").document
    report = verify(runs / name)
    assert not document["ok"]
    assert [(entry["file"], entry["start"], entry["stop"]) for entry in document["damage"]] == [
        (damage.file, damage.start, damage.stop) for damage in report.damage
    ]


def test_diff_of_equal_ones_ends_with_0(run: Run, runs: Path) -> None:
    ran = run("diff", runs / step(1), runs / step(2))
    assert (ran.status, ran.out) == (0, "8 tensors equal\n")
    assert run("diff", runs / step(1), runs / "stock-7").status == 0


def test_diff_tells_how_far_values_moved(run: Run, runs: Path) -> None:
    ran = run("diff", runs / step(1), runs / step(3), "--json")
    assert ran.status == 1
    (moved,) = ran.document["moved"]
    before, after = make_state()["model"]["w"], make_state(0.5)["model"]["w"]
    apart = (after - before).double()
    assert moved["name"] == "model.w"
    assert moved["num_changed"] == moved["numel"] == 30000
    assert moved["max_abs"] == pytest.approx(float(apart.abs().max()))
    assert moved["relative"] == pytest.approx(float(apart.norm() / before.double().norm()))
    assert ran.document["num_equal"] == 7
    assert run("diff", runs / step(1), runs / step(3), "many").status == 0
    assert run("diff", runs / step(1), runs / step(3), "--no-values").status == 0


def test_diff_tells_names_shapes_dtypes_and_leaves(run: Run, tmp_path: Path) -> None:
    with CheckpointEngine(tmp_path) as engine:
        a = {"w": torch.ones(4), "x": torch.ones(2, 2), "gone": torch.ones(1), "kind": torch.ones(1), "n": 1}
        engine.save(a, step=1).upload_completion.result()
        b = {"w": torch.ones(4).half(), "x": torch.ones(4), "new": torch.ones(1), "kind": "text", "n": [2]}
        engine.save(b, step=2).upload_completion.result()
    document = run("diff", tmp_path / step(1), tmp_path / step(2), "--json").document
    assert (document["only_in_a"], document["only_in_b"]) == (["gone"], ["new"])
    assert document["leaves"] == [{"name": "n", "a": "1", "b": "[2]"}]
    assert set(names(document["changed"])) == {"w", "x", "kind"}
    assert document["num_equal"] == 1
    assert document["moved"] == []


def test_diff_takes_what_is_no_number_for_equal_to_itself(run: Run, tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    with CheckpointEngine(tmp_path) as engine:
        engine.save({"w": torch.tensor([nan, inf, 1.0])}, step=1).upload_completion.result()
        engine.save({"w": torch.tensor([nan, inf, 1.0])}, step=2).upload_completion.result()
        engine.save({"w": torch.tensor([nan, nan, 1.0])}, step=3).upload_completion.result()
    assert run("diff", tmp_path / step(1), tmp_path / step(2)).status == 0
    (moved,) = run("diff", tmp_path / step(1), tmp_path / step(3), "--json").document["moved"]
    assert (moved["num_changed"], moved["max_abs"]) == (1, None)


def test_diff_compares_leaves_that_are_no_plain_tensors(run: Run, tmp_path: Path) -> None:
    with CheckpointEngine(tmp_path) as engine:
        sparse = torch.eye(4).to_sparse()
        engine.save({"s": sparse, "i": torch.arange(3), "e": 1}, step=1).upload_completion.result()
        engine.save({"s": sparse * 2, "i": torch.arange(3), "e": 2}, step=2).upload_completion.result()
    document = run("diff", tmp_path / step(1), tmp_path / step(2), "--json").document
    assert names(document["moved"]) == ["s"]
    assert document["leaves"] == [{"name": "e", "a": "1", "b": "2"}]


def test_diff_matches_tensors_that_lie_in_other_orders(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_async.cli.comparison._WAITING_BYTES", 100)
    tensors = {str(number): torch.full((10,), float(number)) for number in range(20)}
    backwards = dict(reversed(tensors.items()))
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "a", no_dist=True)
    save_file(backwards, tmp_path / "b.safetensors")
    ran = run("diff", tmp_path / "a", tmp_path / "b.safetensors")
    assert (ran.status, ran.out) == (0, "20 tensors equal\n")


@pytest.mark.parametrize("name", [step(1), "stock-7"])
def test_cp_copies_what_loads_and_verifies(run: Run, runs: Path, tmp_path: Path, name: str) -> None:
    ran = run("cp", runs / name, tmp_path / "elsewhere" / "copy", "--json")
    assert ran.status == 0
    copy = Path(ran.document["target"])
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in (runs / name).iterdir()
    }
    assert run("diff", runs / name, copy).status == 0
    assert list((tmp_path / "elsewhere").iterdir()) == [copy]


def test_cp_into_a_directory_keeps_the_name(run: Run, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    assert run("cp", runs / step(1), tmp_path / "backup").status == 0
    assert run("verify", tmp_path / "backup" / step(1)).status == 0


def test_cp_of_a_damaged_one_leaves_nothing(run: Run, runs: Path, tmp_path: Path) -> None:
    (file,) = data_files(runs / step(1))
    flip(file, 1000)
    ran = run("cp", runs / step(1), tmp_path / "copies" / "one")
    assert ran.status == 1
    assert "nothing was copied" in ran.err
    assert list((tmp_path / "copies").iterdir()) == []


def test_cp_over_another_one_is_refused(run: Run, runs: Path) -> None:
    ran = run("cp", runs / step(1), runs / step(2))
    assert ran.status == 4
    assert "is there already" in ran.err


def test_cp_clears_away_what_a_killed_one_has_left(run: Run, runs: Path) -> None:
    left = runs / ".copy.copy-12345"
    shutil.copytree(runs / step(1), left)
    assert run("ls", runs, "--json").document["checkpoints"][-1]["name"] == "stock-7"
    assert run("cp", runs / step(1), runs / "copy").status == 0
    assert not left.exists()


@pytest.mark.parametrize("name", [step(1), "stock-7"])
def test_rm_removes_all_of_a_checkpoint(run: Run, runs: Path, name: str) -> None:
    ran = run("rm", "--yes", runs / name)
    assert ran.status == 0
    assert ran.out.startswith("removed ")
    assert not (runs / name).exists()
    assert len(run("ls", runs, "--json").document["checkpoints"]) == 3


def test_rm_leaves_and_names_what_others_put_there(run: Run, runs: Path) -> None:
    (runs / step(1) / "notes.txt").touch()
    document = run("rm", "--yes", runs / step(1), "--json").document
    assert document["removed"][0]["left"] == ["notes.txt"]
    assert [file.name for file in (runs / step(1)).iterdir()] == ["notes.txt"]


def test_rm_on_a_dry_run_removes_nothing(run: Run, runs: Path) -> None:
    ran = run("rm", "--dry-run", runs / step(1), runs / step(2))
    assert ran.out.count("would remove") == 2
    assert run("verify", runs / step(1)).status == 0


def test_rm_looks_all_of_them_up_before_it_removes_one(run: Run, runs: Path) -> None:
    assert run("rm", "--yes", runs / step(1), runs / "nothing").status == 3
    assert (runs / step(1)).exists()


def test_rm_that_nobody_confirms_is_refused(run: Run, runs: Path) -> None:
    ran = run("rm", runs / step(1))
    assert ran.status == 4
    assert "--yes" in ran.err
    assert (runs / step(1)).exists()


def test_rm_of_one_that_is_being_read_is_refused(run: Run, runs: Path) -> None:
    with open_checkpoint(runs / step(1)):
        ran = run("rm", "--yes", runs / step(1))
    assert ran.status == 4
    assert run("rm", "--yes", runs / step(1)).status == 0


def test_rm_tells_what_it_removed_before_one_that_it_could_not(run: Run, runs: Path) -> None:
    with open_checkpoint(runs / step(2)):
        ran = run("rm", "--yes", "--json", runs / step(1), runs / step(2))
    assert ran.status == 4
    assert [entry["path"] for entry in ran.document["removed"]] == [str(runs / step(1))]


def test_rm_of_one_that_is_named_twice_removes_it_once(run: Run, runs: Path) -> None:
    ran = run("rm", "--yes", runs / step(1), f"{runs / step(1)}/")
    assert ran.status == 0
    assert ran.out.count("removed ") == 1


def test_rm_of_a_link_is_not_found(run: Run, runs: Path) -> None:
    (runs / "newest").symlink_to(step(3))
    assert run("rm", "--yes", runs / "newest").status == 3
    assert run("verify", runs / step(3)).status == 0


def test_prune_keeps_what_one_of_its_options_keeps(run: Run, tmp_path: Path) -> None:
    with CheckpointEngine(tmp_path) as engine:
        for number, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]):
            notes = {"loss": loss}
            engine.save({"w": torch.ones(2)}, step=number, notes=notes).upload_completion.result()
        engine.save({"w": torch.ones(2)}, checkpoint_id="best").upload_completion.result()
    arguments = ("prune", tmp_path, "--keep-latest", "1", "--keep-every-steps", "4", "--keep-best", "loss:2")
    dry = run(*arguments, "--dry-run")
    assert dry.status == 0
    assert dry.out.count("would remove") == 1
    assert run(*arguments).status == 4, "nobody has confirmed it"
    document = run(*arguments, "--yes", "--json").document
    assert [entry["path"] for entry in document["removed"]] == [str(tmp_path / step(3))]
    assert list(document["kept"]) == ["best", *(step(number) for number in (0, 1, 2, 4, 5))]
    assert document["kept"][step(1)] == ["KeepBest('loss', 2, mode='min')"]
    assert names(run("ls", tmp_path, "--json").document["checkpoints"]) == list(document["kept"])
    worst = run("prune", tmp_path, "--keep-best", "loss:1:max", "--dry-run", "--json").document
    assert list(worst["kept"]) == ["best", step(5)]


def test_prune_keeps_the_newest_that_is_whole_and_those_that_are_not(run: Run, runs: Path) -> None:
    shutil.rmtree(runs / "stock-7")
    (file,) = data_files(runs / step(3))
    file.unlink()
    manifest_file(runs / step(1)).unlink()
    ran = run("prune", runs, "--keep-latest", "1", "--yes", "--json")
    assert ran.status == 0
    assert ran.document["removed"] == []
    assert ran.document["kept"][step(2)] == ["the newest", "KeepLatest(1)"]
    assert ran.document["kept"][step(3)] == ["not whole"]
    assert ran.document["kept"][step(1)] == ["can't be read"]


def test_prune_counts_as_a_save_does(run: Run, tmp_path: Path) -> None:
    with CheckpointEngine(tmp_path) as engine:
        for number in range(6):
            engine.save({"w": torch.ones(2)}, step=number).upload_completion.result()
    (tmp_path / "best").symlink_to(step(1))
    for number in (4, 5):
        data_files(tmp_path / step(number))[0].unlink()
    document = run("prune", tmp_path, "--keep-latest", "2", "--yes", "--json").document
    assert document["kept"] == {
        step(1): ["the link 'best'"],
        step(2): ["KeepLatest(2)"],
        step(3): ["the newest", "KeepLatest(2)"],
        step(4): ["not whole"],
        step(5): ["not whole"],
    }
    assert [entry["path"] for entry in document["removed"]] == [str(tmp_path / step(0))]
    assert (tmp_path / "best" / ".metadata").exists()


def test_prune_spares_what_is_being_read(run: Run, runs: Path) -> None:
    with open_checkpoint(runs / step(1)):
        (first, _) = run("prune", runs, "--keep-latest", "1", "--yes", "--json").document["removed"]
    assert first["kept"]
    assert (runs / step(1)).exists()
    assert (runs / "stock-7").exists(), "digits in a name that somebody else gave are no step"


@pytest.mark.parametrize("arguments", [[], ["--keep-best", "loss"], ["--keep-best", "loss:0"]])
def test_prune_that_is_told_nothing_sensible_removes_nothing(
    run: Run, runs: Path, arguments: list[str]
) -> None:
    assert run("prune", runs, "--yes", *arguments).status == 2
    assert len(run("ls", runs, "--json").document["checkpoints"]) == 4


@pytest.mark.parametrize("name", [step(3), "stock-7"])
def test_convert_to_dcp_keeps_all_that_was_saved(run: Run, runs: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "converted" / "one"
    target.parent.mkdir()
    ran = run("convert", runs / name, target, "--to", "dcp")
    assert (ran.status, ran.err) == (0, "")
    assert run("diff", runs / name, target).out == "8 tensors equal\n"
    shown = [run("show", path, "--json").document["checkpoint"] for path in (runs / name, target)]
    assert shown[0]["step"] == shown[1]["step"]
    assert shown[0]["notes"] == shown[1]["notes"]
    assert shown[1]["producer"] == "dcp_async"
    assert [path.name for path in target.parent.iterdir()] == ["one"]


def test_convert_of_a_model_to_dcp(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(2, 3), "b": torch.arange(4), "none": torch.empty(0)}, model)
    assert run("convert", model, tmp_path / "dcp", "--to", "dcp").status == 0
    assert run("diff", model, tmp_path / "dcp").out == "3 tensors equal\n"
    loaded = {"a.weight": torch.empty(2, 3), "b": torch.empty(4, dtype=torch.int64)}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(loaded["b"], torch.arange(4))


@pytest.mark.parametrize("name", [step(3), "stock-7"])
def test_convert_to_torch_gives_what_torch_loads(run: Run, runs: Path, tmp_path: Path, name: str) -> None:
    assert run("convert", runs / name, tmp_path / "one.pt", "--to", "torch").status == 0
    loaded = torch.load(tmp_path / "one.pt", weights_only=True)
    expected = make_state(0.5 if name == step(3) else 0.0)
    assert torch.equal(loaded["model"]["w"], expected["model"]["w"])
    assert torch.equal(loaded["many"][4], expected["many"][4])
    assert loaded["half"].dtype == torch.bfloat16
    assert loaded["epoch"] == 3


def test_convert_keeps_ties_strides_and_other_layouts(run: Run, tmp_path: Path) -> None:
    shared = torch.randn(4, 5)
    state = {
        "a": shared,
        "b": shared,
        "t": torch.randn(6, 7).t(),
        "s": torch.eye(3).to_sparse(),
        "i": {2: []},
    }
    with CheckpointEngine(tmp_path) as engine:
        engine.save(state, step=1).upload_completion.result()
    assert run("convert", tmp_path / step(1), tmp_path / "two", "--to", "dcp").status == 0
    with open_checkpoint(tmp_path / "two") as checkpoint:
        read = checkpoint.read()
    assert read["a"].data_ptr() == read["b"].data_ptr()
    assert read["t"].stride() == state["t"].stride()  # type: ignore[attr-defined]
    assert torch.equal(read["s"].to_dense(), torch.eye(3))
    assert read["i"] == {2: []}


def test_convert_of_a_damaged_one_leaves_nothing(run: Run, runs: Path, tmp_path: Path) -> None:
    (file,) = data_files(runs / step(1))
    flip(file, 70000)
    (tmp_path / "out").mkdir()
    assert run("convert", runs / step(1), tmp_path / "out" / "one", "--to", "dcp").status == 1
    assert run("convert", runs / step(1), tmp_path / "out" / "one.pt", "--to", "torch").status == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["dcp", "safetensors", "torch"])
def test_convert_of_a_damaged_file_of_torch_save_leaves_nothing(run: Run, tmp_path: Path, form: str) -> None:
    source = tmp_path / "one.pt"
    torch.save({"w": torch.arange(1000.0)}, source)
    flip(source, 2000)
    ran = run("convert", source, tmp_path / "out", "--to", form)
    assert ran.status == 1
    assert "does not match its CRC-32; nothing was written" in ran.err
    assert os.listdir(tmp_path) == ["one.pt"]


def test_a_directory_s_name_is_no_command_to_the_terminal(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "\x1b[2J"
    with CheckpointEngine(root) as engine:
        engine.save({"w": torch.ones(2)}, checkpoint_id="a").upload_completion.result()
    path = (root / "a").rename(root / "a\x1b]0;b")
    for arguments in (("ls", root), ("show", path), ("verify", path), ("cp", path, tmp_path / "\x1b[3J")):
        ran = run(*arguments)
        assert ran.status == 0
        assert "\x1b" not in ran.out + ran.err


def test_cp_takes_nothing_of_others_for_what_a_killed_copy_left(run: Run, runs: Path, tmp_path: Path) -> None:
    theirs = tmp_path / ".new.copy-mine"
    theirs.mkdir()
    (theirs / "precious").touch()
    (tmp_path / ".new.copy-12").touch()
    (tmp_path / ".new.copy-13").symlink_to(theirs)
    assert run("cp", runs / step(1), tmp_path / "new").status == 0
    assert (tmp_path / ".new.copy-13" / "precious").exists()
    assert (tmp_path / ".new.copy-12").exists()


def test_cp_into_the_source_itself_is_refused_and_leaves_it_as_it_is(run: Run, runs: Path) -> None:
    before = os.listdir(runs / step(1))
    ran = run("cp", runs / step(1), runs / step(1) / "deep" / "copy")
    assert ran.status == 4
    assert "lies in" in ran.err
    assert os.listdir(runs / step(1)) == before


@pytest.mark.parametrize("form", ["dcp", "torch"])
def test_convert_into_a_directory_that_is_not_there_names_it(
    run: Run, runs: Path, tmp_path: Path, form: str
) -> None:
    ran = run("convert", runs / step(1), tmp_path / "nothing" / "one", "--to", form)
    assert ran.status == 3
    assert f"there is no directory {tmp_path / 'nothing'} to write one into" in ran.err


def test_convert_over_something_is_refused(run: Run, runs: Path) -> None:
    assert run("convert", runs / step(1), runs / step(2), "--to", "dcp").status == 4


def test_convert_to_safetensors_gives_what_others_load(run: Run, runs: Path, tmp_path: Path) -> None:
    for name in (step(3), "stock-7"):
        ran = run("convert", runs / name, tmp_path / name, "--to", "safetensors", "--weights", "model")
        assert (ran.status, ran.err) == (0, "")
        weights = load_file(tmp_path / name / "model.safetensors")
        expected = make_state(0.5 if name == step(3) else 0.0)["model"]
        assert weights.keys() == expected.keys()
        assert torch.equal(weights["w"], expected["w"])
        assert run("diff", runs / name, tmp_path / name).out == "8 tensors equal\n"
        assert run("cp", tmp_path / name, tmp_path / "copies" / name).status == 0


def test_convert_of_a_file_of_torch_save(run: Run, tmp_path: Path) -> None:
    torch.save(make_state(), tmp_path / "one.pt")
    for form in ("dcp", "safetensors"):
        assert run("convert", tmp_path / "one.pt", tmp_path / form, "--to", form).status == 0
        assert run("diff", tmp_path / "one.pt", tmp_path / form).out == "8 tensors equal\n"


def test_convert_keeps_the_shapes_of_views_of_the_same_bytes(run: Run, tmp_path: Path) -> None:
    weight = torch.arange(9.0).reshape(3, 3)
    views = {"weight": weight, "flat": weight.view(-1), "turned": weight.t(), "tied": weight}
    torch.save(views, tmp_path / "views.pt")
    for form in ("dcp", "torch", "safetensors"):
        assert run("convert", tmp_path / "views.pt", tmp_path / form, "--to", form).status == 0
        assert run("diff", tmp_path / "views.pt", tmp_path / form).out == "4 tensors equal\n"


def test_convert_keeps_empty_tensors_that_lie_at_one_place(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    save_file({"a": torch.empty(0), "b": torch.empty(0, 4, dtype=torch.float32)}, model)
    assert run("convert", model, tmp_path / "dcp", "--to", "dcp").status == 0
    assert run("diff", model, tmp_path / "dcp").out == "2 tensors equal\n"


def test_convert_takes_weights_with_safetensors_alone(run: Run, runs: Path, tmp_path: Path) -> None:
    assert run("convert", runs / step(1), tmp_path / "x", "--to", "dcp", "--weights", "model").status == 2
    ran = run("convert", runs / step(1), tmp_path / "x", "--to", "safetensors", "--weights", "none")
    assert ran.status != 0
    assert not (tmp_path / "x").exists()


def test_urls_name_roots_and_checkpoints(run: Run) -> None:
    root = "memory://command-line"
    with CheckpointEngine(root) as engine:
        engine.save(make_state(), step=1, notes={"loss": 1}).upload_completion.result()
        engine.save(make_state(), step=2).upload_completion.result()
        assert names(run("ls", root, "--json").document["checkpoints"]) == [step(1), step(2)]
        assert run("verify", f"{root}/{step(1)}").status == 0
        assert run("diff", f"{root}/{step(1)}", f"{root}/{step(2)}").status == 0
        assert run("show", f"{root}/{step(1)}", "model", "--json").document["checkpoint"]["notes"] == {
            "loss": 1
        }
        assert run("show", f"{root}/nothing").status == 3
        assert run("prune", root, "--keep-latest", "1", "--yes").status == 0
        assert names(run("ls", root, "--json").document["checkpoints"]) == [step(2)]
    MemoryStorage.clear("command-line")
