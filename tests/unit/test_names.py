"""File names: what is written is recognised, and nobody else's is taken for one of ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_async import _names as names

UIDS = st.text("0123456789abcdef", min_size=names.UID_DIGITS, max_size=names.UID_DIGITS)
RANKS = st.integers(0, 2**20)


@given(UIDS, RANKS, RANKS)
def test_what_is_written_is_recognised_with_its_kind_and_uid(uid: str, rank: int, number: int) -> None:
    written = {
        names.data_file(rank, number, uid): "data",
        names.manifest_file(uid): "manifest",
        names.temporary_metadata(uid): "temporary",
        names.lease_file(uid): "lease",
    }
    for name, kind in written.items():
        assert names.owned_file(name) == (kind, uid)
    assert names.is_manifest(names.manifest_file(uid))
    for name, kind in written.items():
        is_published = kind in ("data", "manifest")
        assert names.names_file_of_ours(b"\x80\x02X" + name.encode() + b"q\x00") is is_published


@pytest.mark.parametrize(
    "name",
    [
        ".metadata",
        "__0_0.distcp",  # stock's
        "__0.metadata",
        "__0_0-0123456789abcde.distcp",  # a digit short
        "__0_0-0123456789ABCDEF.distcp",
        "__0_0-0123456789abcdef.distcp.bak",
        "copy of __0_0-0123456789abcdef.distcp",
        "manifest-0123456789abcdef.json\n",
        "__\u0661_0-0123456789abcdef.distcp",  # a digit, but none that we write
        "model.safetensors",
        "config.json",
        ".attached-0123456789abcdef-",
        ".attached-0123456789ABCDEF-config.json",
    ],
)
def test_what_others_write_is_none_of_ours(name: str) -> None:
    assert names.owned_file(name) is None


@given(st.integers(0, 2**63 - 1))
def test_the_directory_of_a_step_is_recognised(step: int) -> None:
    assert names.is_step_directory(names.step_directory(step))


@pytest.mark.parametrize(
    "name", ["step-1", "step-", "step-00000001.bak", "astep-00000001", "step-0000000\u0661"]
)
def test_no_other_directory_is_taken_for_one_of_a_step(name: str) -> None:
    assert not names.is_step_directory(name)


@given(RANKS)
def test_stocks_metadata_of_a_rank_tells_the_rank(rank: int) -> None:
    assert names.rank_of_metadata(f"__{rank}.metadata") == rank
    assert names.rank_of_metadata(f"__{rank}_0.distcp") is None
