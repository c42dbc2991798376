"""Worker processes: the work queue, virtqueues and the data path of each back-end."""

if __name__ != "vhostmp.workers":
    raise ImportError(f"imported as {__name__!r}: use 'import vhostmp.workers'")
