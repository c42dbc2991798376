"""Tests of vhostmp.protocol."""
