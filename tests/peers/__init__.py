"""Tests with programs of other people's: QEMU, DPDK."""
