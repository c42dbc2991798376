"""The back-end in Python that the torture tests swap in: `python:<this file>:Patient`."""

from __future__ import annotations

from vhostmp.tools.demo_backend import PythonLoopback


class Patient(PythonLoopback):
    """The demo's, with a dwell so long that everything a control process does without a barrier falls into it."""

    hold_seconds = 0.02
