"""What a run of the benchmarks leaves: JSON, a table, and the generated part of docs/performance.md.

Rule: of docs/performance.md only what stands between the two marks is written; the rest is prose, for people to write.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from vhostmp.errors import LocalError
from vhostmp.tools.bench.cases import Result

BEGIN: Final = "<!-- results: written by `make bench` -->"
END: Final = "<!-- end of results -->"


@attrs.frozen
class Report:
    """The results of a run, the cases that were skipped (a line each), the facts of the host."""

    results: Sequence[Result]
    skipped: Sequence[str]
    host: dict[str, str]
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Return the object that --json prints."""
        return {
            "cases": [result.to_json() for result in self.results],
            "skipped": list(self.skipped),
            "host": self.host,
        }

    def table(self) -> str:
        """Return the results as a Markdown table."""
        lines = [
            "| case | frame, bytes | ring | vhostmp, Mpps | ns a packet | peer | peer, Mpps | ratio | cores | rounds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for result in self.results:
            case = result.case
            cells = (
                case.name,
                case.size,
                f"{case.ring} {case.ring_format}",
                result.mpps.text(),
                f"{1e3 / result.mpps.median:.1f}" if result.mpps.median else "-",
                case.peer,
                result.peer_mpps.text(),
                f"**{result.ratio.median:.2f}** [{result.ratio.low:.2f}-{result.ratio.high:.2f}]",
                f"{result.placement}, {result.distance_ns:.0f} ns",
                result.rounds,
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines)

    def markdown(self) -> str:
        """Return the generated part of docs/performance.md."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        facts = "\n".join(f"| {name} | {value} |" for name, value in self.host.items())
        skipped = "".join(f"\nSkipped: {line}.\n" for line in self.skipped)
        return (
            f"{BEGIN}\n\nMeasured on {today}, {self.rounds} rounds; median [smallest-largest] over the rounds,"
            " the ratio taken inside each round.\n\n"
            f"{self.table()}\n{skipped}\n| the machine | |\n|---|---|\n{facts}\n\n{END}"
        )

    def update(self, path: Path) -> None:
        """Replace the generated part of the file `path`. LocalError when it has no such part."""
        try:
            text = path.read_text()
            before, found, rest = text.partition(BEGIN)
            _, end, after = rest.partition(END)
            if not found or not end:
                raise LocalError(f"{path} has no lines '{BEGIN}' and '{END}'")
            path.write_text(f"{before}{self.markdown()}{after}")
        except OSError as error:
            raise LocalError(f"cannot update {path}: {error.strerror}") from error
