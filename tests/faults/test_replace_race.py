"""Some seconds of what `nox -s soak` does for half an hour."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("replace_race.py")


def test_readers_of_a_checkpoint_that_is_replaced_all_the_time_are_told_of_no_error(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--minutes=0.04", "--seed=7", f"--dir={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"load_latest: [1-9]", ran.stdout), ran.stdout
    assert re.search(r"failures: 0$", ran.stdout, re.MULTILINE), ran.stdout
