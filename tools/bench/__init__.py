"""Benchmarks beside real peers, on the same cores in the same run: `vhostmp bench`, `make bench`.

- `command`    the command line, and a run from beginning to end
- `cases`      the table of what is measured, with its goals
- `sides`      which programs a case has on its two sides
- `runner`     one case, its rounds interleaved
- `rounds`     the arithmetic: windows, medians, spreads, ratios
- `measures`   the table of what else is looked at: latency, the swap, what idle devices cost
- `latency`    round trips; `costs` the other measures
- `in_guest`   Linux's vhost-net and ours in a guest, which runs `vhost_net`
- `placement`  processors, priorities, and how far the two cores are apart
- `programs`   testpmd as front-end and as back-end, `vhostmp serve`
- `flood`      the front-end of our own
- `insight`    what our workers say of themselves
- `python_backend`, `numpy_backend`  what Python's cost a packet is held by
- `devices`    taps and pairs of devices, and the bare loop that writes to them
- `host`       facts of the machine, huge pages
- `report`     JSON, tables, docs/performance.md; `plot` its picture
"""
