"""Benchmarks beside real peers, on the same cores in the same run: `make bench`, `python -m vhostmp.tools.bench`.

- `cases`      what is measured, and the arithmetic: medians, spreads, ratios
- `placement`  processors, priorities, and how far the two cores are apart
- `programs`   the other side of a case: testpmd as front-end and as back-end, `vhostmp serve`
- `tap`        the tap case and its yardstick
- `runner`     one case, its rounds interleaved
- `host`       facts of the machine, huge pages
- `report`     JSON, the table, docs/performance.md
"""
