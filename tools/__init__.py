"""What a user runs beside the back-end: the swap demo and the benchmarks."""

if __name__ != "vhostmp.tools":
    raise ImportError(f"imported as {__name__!r}: use 'import vhostmp.tools'")
