"""Shared memory: segments, guest memory, the memory table, atomics and the read-copy-update domain."""

if __name__ != "vhostmp.shm":
    raise ImportError(f"imported as {__name__!r}: use 'import vhostmp.shm'")
