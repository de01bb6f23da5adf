"""Fixtures for all tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out waiting for the disk: it makes files safe from power cuts, and tests that write many slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
