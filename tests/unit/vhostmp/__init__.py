"""Tests of vhostmp/."""
