"""Tests with made-up input: messages and descriptor tables."""
