"""Tests in which something dies or is taken away at a bad moment."""
