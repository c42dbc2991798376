"""The command `vhostmp`, and `python -m vhostmp`."""

import sys


def run() -> int:
    """Run it; returns the exit status. Ctrl-C is no mistake of ours, not while modules are loaded either."""
    try:
        from vhostmp.cli import main  # noqa: PLC0415 - Ctrl-C may come while it is loaded

        return main()
    except KeyboardInterrupt:
        return 130  # as a shell says it: 128 and SIGINT


if __name__ == "__main__":
    sys.exit(run())
