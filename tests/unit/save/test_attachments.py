"""Which rank writes what several attach, and what they must not attach."""

from __future__ import annotations

import re

import pytest

from dcp_async._names import (
    ATTACHED_NAME_BYTES,
    attached_copy,
    attached_file,
    attached_name,
    owned_file,
    why_not_attachable,
)
from dcp_async.planning import ConflictError
from dcp_async.save.attachments import Attachment, Attachments, deal

UID = "0123456789abcdef"


def told(**files: bytes) -> dict[str, tuple[int, str]]:
    return Attachments({name: Attachment.of(content) for name, content in files.items()}, UID).told


def test_each_name_is_written_by_the_first_rank_that_has_it() -> None:
    assert deal([told(b=b"b"), {}, told(a=b"a", b=b"b"), told(a=b"a", c=b"")]) == [["b"], [], ["a"], ["c"]]


def test_other_bytes_under_one_name_are_refused_with_both_ranks() -> None:
    with pytest.raises(ConflictError, match=re.escape("files['a'] has 3 bytes on rank 1 and other ones (3")):
        deal([{}, told(a=b"one"), {}, told(a=b"two")])


def test_names_of_several_ranks_that_differ_in_case_alone_are_refused() -> None:
    with pytest.raises(ConflictError, match=r"'a'\] of rank 0 and files\['A'\] of rank 1"):
        deal([told(a=b""), told(A=b"")])


@pytest.mark.parametrize(
    "name", ["config.json", "x" * ATTACHED_NAME_BYTES, "a b", "caf\u00e9", "a.-b_1", "-"]
)
def test_what_can_be_attached_is_recognised_by_its_file(name: str) -> None:
    assert why_not_attachable(name) == ""
    file = attached_file(UID, name)
    assert len(file.encode()) <= 255
    assert owned_file(file) == ("attached", UID)
    assert attached_name(file) == name
    assert owned_file(attached_copy(UID, name)) == ("copy", UID)
    assert attached_name(attached_copy(UID, name)) == ""
