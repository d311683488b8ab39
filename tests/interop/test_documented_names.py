"""Every name that torch's page on checkpoints lists works through ours, with a real model and optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.documented_names import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")


@pytest.mark.parametrize("case", set(CASES.values()), ids=lambda case: case.__name__)
async def test_on_one_rank(case: Case, tmp_path: Path) -> None:
    await case(str(tmp_path / "step-1"))


def test_the_list_is_torchs() -> None:
    assert len(CASES) == 24
