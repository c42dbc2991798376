"""Messages as an enemy sends them."""

from __future__ import annotations

from vhostmp.tools.stress.clause import Context, clause
from vhostmp.tools.stress.consts import Request
from vhostmp.tools.stress.frontend import vring
from vhostmp.tools.stress.link import Outcome


@clause("hostile", "vring-num-zero", source="CVE-2017-17381; vhost-user, SET_VRING_NUM")
def vring_num_zero(ctx: Context) -> None:
    """A ring of no entries."""
    machine = ctx.machine()
    outcome = ctx.rejects(machine.link, Request.SET_VRING_NUM, vring(0, 0))
    if outcome is not Outcome.CLOSED:
        machine.probe()
