"""What was measured once and holds until something it depends on changes, in one SQLite file."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import platformdirs

_WAIT_SECONDS = 30


class Cache:
    """A table of JSON values by key; several processes may share the file.

    Args:
        path: The file; None keeps everything in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._memory: dict[str, str] = {}
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._create()
            except sqlite3.DatabaseError:
                # A file that is no database any more is worth nothing; what it held is measured again.
                path.unlink(missing_ok=True)
                self._create()
            except OSError:
                self._path = None  # a home that cannot be written costs time, not the result

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """The value for a key; None if it is not known."""
        digest = _digest(key)
        if digest in self._memory:
            return json.loads(self._memory[digest])
        if self._path is None:
            return None
        with closing(self._open()) as connection:
            row = connection.execute("SELECT value FROM measured WHERE key = ?", (digest,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Remember a value."""
        digest, text = _digest(key), json.dumps(value)
        self._memory[digest] = text
        if self._path is None:
            return
        with closing(self._open()) as connection, connection:
            connection.execute("INSERT OR REPLACE INTO measured VALUES (?, ?)", (digest, text))

    def _create(self) -> None:
        with closing(self._open()) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS measured (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    def _open(self) -> sqlite3.Connection:
        assert self._path is not None
        return sqlite3.connect(self._path, timeout=_WAIT_SECONDS)


def open_cache(enabled: bool) -> Cache:
    """The cache in the user's cache folder, or in ``LOWRANK_ONNX_CACHE``; one in memory if not enabled."""
    if not enabled:
        return Cache(None)
    folder = os.environ.get("LOWRANK_ONNX_CACHE") or platformdirs.user_cache_dir("lowrank-onnx")
    return Cache(Path(folder) / "measured.sqlite")


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
