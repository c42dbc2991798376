"""Linux's vhost-net and ours on the same random cases, side by side, in a guest: `make oracle`.

    python -m tests.kernel [--seed SEED] [--cases 2000] [--guests 2]
    python -m tests.kernel --case JSON

As root, after `make peers`. Exit status 1 when they differ, or when a rule is not needed any more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.kernel import host
from tests.kernel.guest import Request
from tests.peers import image


def main() -> int:
    """Run the cases and print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--seed", default=str(int(time.time())), help="what the cases are made from (default: the time)"
    )
    parser.add_argument("--cases", type=int, default=2000, help="how many (default %(default)s)")
    parser.add_argument(
        "--guests", type=int, default=os.cpu_count() or 1, help="how many at once (default %(default)s)"
    )
    parser.add_argument("--case", type=json.loads, metavar="JSON", help="run this one again")
    arguments = parser.parse_args()
    if missing := image.missing():
        print(f"oracle: {missing}", file=sys.stderr)
        return 2
    if arguments.case is not None:
        requests = [Request(seed=arguments.case["seed"], given=[arguments.case], shrink=0)]
    else:
        requests = host.shares(arguments.seed, arguments.cases, arguments.guests)
        print(f"seed {arguments.seed}, {arguments.cases} cases")

    def progress(count: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{count} of {arguments.cases}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        report = host.run(Path(folder), requests, progress=progress)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    print(report)
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
