"""`python -m vhostmp` is the command `vhostmp`."""

import sys

from vhostmp.cli import main

if __name__ == "__main__":
    sys.exit(main())
