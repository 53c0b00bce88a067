"""Fixtures of the store's tests."""

from __future__ import annotations

import pytest

from rlhf.collection import schema


@pytest.fixture
def no_fsync(monkeypatch):
    """Thousands of small transactions need not reach the disk in a test of something else."""

    def connect(path, connect=schema.connect):
        connection = connect(path)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    monkeypatch.setattr(schema, "connect", connect)
