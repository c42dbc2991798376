"""Tests that try to break an ordering argument: 1 s each, SECONDS=30 by hand."""
