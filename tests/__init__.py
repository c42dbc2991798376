"""Tests: one folder for each kind of promise (tests/README.md)."""
