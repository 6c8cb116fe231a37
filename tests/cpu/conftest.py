"""Fixtures of the CPU tests."""

from compiler_fixtures import workbench

__all__ = ["workbench"]
