"""Tests with real processes, memory and descriptors."""
