"""The table of measures: what is looked at besides packets a second. A new measure is a new row."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Final

from vhostmp.tools.bench import costs, in_guest, latency
from vhostmp.tools.bench.figures import Measure

MEASURES: Final = (
    Measure("round-trip", "percentiles of round trips, polling, at 1, 50 and 90 % load", 20.0, latency.polling),
    Measure("round-trip-event", "the same asleep between packets, beside bare eventfds", 30.0, latency.event),
    Measure("swap", "pause and grace period of a swap under full load", 9.0, costs.swap),
    Measure("start", "how long the server takes until front-ends can connect", 6.0, costs.start, quick=True),
    Measure("idle", "what a server costs that has nothing to do", 4.0, costs.idle, quick=True),
    Measure("devices", "what very many idle devices cost", 20.0, costs.devices),
    Measure("scaling", "cost and rate with more and more devices", 20.0, costs.scaling),
    Measure("fairness", "a quiet device beside a greedy one", 4.0, costs.fairness),
    Measure("section", "what a read-side section costs", 1.0, costs.section, quick=True),
    Measure("safety", "what journal, checks and counters cost, against builds without", 180.0, costs.safety),
    Measure("vhost-net", "what a frame costs Linux's vhost-net and ours, in one guest", 120.0, in_guest.vhost_net),
    Measure("log", "what the log of written pages costs", 30.0, costs.dirty_log),
)


def choose(names: Sequence[str], *, quick: bool) -> list[Measure]:
    """Return the measures that `names` (patterns) select; of a first look those that take little time."""
    return [
        measure
        for measure in MEASURES
        if any(fnmatch.fnmatch(measure.name, name) for name in names) and (measure.quick or not quick)
    ]
