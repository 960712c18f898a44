"""Results item by item, in JSONL files that survive an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class RecordFile:
    """A JSONL file of objects with a "name", appended to and flushed to the disk batch by batch.

    What an interruption left of a last line is cut off when the file is opened. records: by name, as far as written.
    Raises OSError, and ValueError naming the line where the file is damaged elsewhere.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.records: dict[str, dict[str, Any]] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                self.records[record["name"]] = record
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{self.path}:{number} is damaged: remove the line, and it is done again") from None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._file.truncate(len(whole))

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records; when this returns they are on the disk."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.update((record["name"], dict(record)) for record in records)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, all or nothing."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, all or nothing: under another name, flushed, renamed."""
    unfinished = path.with_name(path.name + ".new")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


__all__ = ["RecordFile", "write_json", "write_text"]
