"""`dcp-async doctor` on real servers, and on what is no bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcp_async.cli import main
from tests.support.buckets import BUCKET, KEYS, Server


@pytest.fixture
def credentials(seaweed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for key, value in KEYS.items():
        monkeypatch.setenv(f"AWS_{key.upper()}", str(value))


@pytest.mark.usefixtures("credentials")
def test_a_bucket_that_is_fit_is_told_and_left_as_it_was(
    seaweed: Server, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"s3://{BUCKET}/{prefix}", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"list", "write"} <= {finding["about"] for finding in findings if finding["level"] == "good"}
    assert seaweed.keys(prefix) == []
    assert main(["doctor", f"s3://{BUCKET}/{prefix}"]) == 0
    assert "LEVEL" in capsys.readouterr().out


@pytest.mark.usefixtures("credentials")
def test_a_bucket_that_is_not_there_is_a_finding(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "s3://no-such-bucket/run1", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["level"] for finding in findings] == ["error"]


def test_a_directory_is_no_bucket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
