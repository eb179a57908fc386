"""Fixtures of the fault tests."""

from tests.faults.tmpfs import small_tmpfs

__all__ = ["small_tmpfs"]
