"""A stage's log: lines of JSON in the order of their records, in files of bounded size, whatever happens to the disk."""
from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import logs
from pipeline.logs import LogWriter
from tests.waiting import until

log = logging.getLogger("tests.logs")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[LogWriter]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    made = logs.setup("stage.0", str(tmp_path), "INFO")
    yield made
    root.handlers[:] = before
    root.setLevel(level)
    made.stop()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_become_lines_in_their_order_and_the_last_ones_are_written_at_the_end(
        writer: LogWriter, tmp_path: Path) -> None:
    values = ["as it was"]
    log.info("first %s\n{forged}", values, extra={"fields": {"status": 200}})
    values[0] = "changed later"
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("second")
    log.debug("never")
    log.info("third")
    writer.stop()
    first, second, third = lines(tmp_path / "stage.0.log")
    assert (first["message"], first["status"], first["process"]) == ("first ['as it was']\n{forged}", 200, "stage.0")
    assert second["level"] == "ERROR" and second["message"].startswith("second\nTraceback")
    assert second["message"].endswith("ValueError: broken") and third["message"] == "third"


def test_lines_are_written_without_waiting_for_the_end(writer: LogWriter, tmp_path: Path) -> None:
    for n in range(3):
        log.info("number %d", n)
        until(lambda n=n: (tmp_path / "stage.0.log").exists() and len(lines(tmp_path / "stage.0.log")) == n + 1)


def test_files_turn_when_they_are_full_and_two_old_ones_are_kept(
        writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer._target, "maxBytes", 1000)
    for n in range(40):
        log.info("number %d %s", n, 100 * "x")
    writer.stop()
    files = sorted(tmp_path.iterdir(), key=lambda path: path.name, reverse=True)
    assert [path.name for path in files] == ["stage.0.log.2", "stage.0.log.1", "stage.0.log"]
    assert all(path.stat().st_size < 1300 for path in files)
    numbers = [int(line["message"].split()[1]) for path in files for line in lines(path)]
    assert numbers == list(range(40 - len(numbers), 40)) and len(numbers) > 8


def test_a_record_that_cannot_be_written_is_lost_and_its_followers_are_not(writer: LogWriter, tmp_path: Path) -> None:
    log.info("no JSON", extra={"fields": {"what": object()}})
    log.info("good")
    writer.stop()
    assert [line["message"] for line in lines(tmp_path / "stage.0.log")] == ["good"] and writer.dropped == 1


def test_what_the_queue_does_not_hold_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logs, "MAX_QUEUED", 2)
    target = logging.FileHandler(tmp_path / "log")
    writer = LogWriter(target)
    for n in range(5):
        writer.handle(logging.LogRecord("name", logging.INFO, "", 0, "number %d", (n,), None))
    writer.start()
    writer.stop()
    assert (tmp_path / "log").read_text() == "number 0\nnumber 1\n" and writer.dropped == 3
