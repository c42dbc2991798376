"""TCP connections between the guest and the host that check every byte; see guest/stream.c.

Rules: each connection carries data both ways all the time. `grow` shows that it lives: it waits until more has come in
at both ends. `finish` shows that nothing was lost: both ends must agree on the number of bytes and their checksum.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import attrs

from tests.helpers import wait_until
from tests.peers.guest import Guest
from tests.peers.image import Image
from tests.peers.network import GUEST_ADDRESS, HOST_ADDRESS, Network
from tests.peers.processes import PATIENCE, Child

GRACE_SECONDS = 0.5
"""For an end that was told to stop and waits for what will not come, when the test has failed already."""

_DONE = re.compile(
    r"^done sent=(\d+) sum=([0-9a-f]{16}) received=(\d+) sum=([0-9a-f]{16}) retransmits=(\d+)$", re.MULTILINE
)
_PROGRESS = re.compile(r"^progress (\d+)$", re.MULTILINE)


@attrs.frozen
class Total:
    """What one end says of one direction."""

    count: int
    """Bytes."""
    checksum: str


@attrs.frozen
class Result:
    """What one end says when the connection has ended well."""

    sent: Total
    received: Total
    retransmits: int

    @classmethod
    def parse(cls, output: str) -> Result:
        """Find the last line of the stream program; AssertionError when there is none."""
        found = _DONE.search(output)
        assert found, f"the connection did not end well:\n{output[-1000:]}"
        return cls(Total(int(found[1]), found[2]), Total(int(found[3]), found[4]), int(found[5]))


@attrs.frozen
class Ends:
    """Between what a connection is made."""

    image: Image
    network: Network
    guest: Guest


class Stream(AbstractContextManager["Stream"]):
    """One TCP connection, made from inside the guest or to it. Leaving the context ends the host's end."""

    def __init__(self, ends: Ends, port: int, *, to_guest: bool = False, cpu: int | None = None) -> None:
        """Connect; the guest's end runs on the guest's processor `cpu` alone when that is given."""
        image, network, guest = ends.image, ends.network, ends.guest
        self._guest = guest
        pinned = ["taskset", "-c", str(cpu)] if cpu is not None else []
        address = GUEST_ADDRESS if to_guest else HOST_ADDRESS
        words = [address, str(port), str(port)]
        log = Path(guest.console.parent) / f"stream-{port}.log"
        if to_guest:
            self._job = guest.start(*pinned, "stream", "listen", *words)
            wait_until(lambda: "listening\n" in self._seen_by_guest(), PATIENCE, "the guest listens")
            self._host = Child(network.inside(image.stream, "connect", *words), log, grace=GRACE_SECONDS)
        else:
            self._host = Child(network.inside(image.stream, "listen", *words), log, grace=GRACE_SECONDS)
            try:
                self._host.expect("^listening$")
                self._job = guest.start(*pinned, "stream", "connect", *words)
            except BaseException:
                self._host.end()
                raise
        try:
            self._host.expect("^connected$")
        except AssertionError as error:
            self._host.end()
            raise AssertionError(f"{error}\nthe guest's end: {self._seen_by_guest()}") from error

    def _seen_by_guest(self) -> str:
        """Return what the guest's end has printed lately."""
        return self._guest.run(f"tail -n 3 {self._job.output}")

    def _received(self) -> tuple[int, int]:
        """Return the bytes received so far by the host and by the guest, as far as they have told."""
        ends = (self._host.output, self._seen_by_guest())
        return (
            max((int(number) for number in _PROGRESS.findall(ends[0])), default=0),
            max((int(number) for number in _PROGRESS.findall(ends[1])), default=0),
        )

    def grow(self, count: int = 1 << 20) -> None:
        """Wait until `count` bytes more than now have come in at each end."""
        begin = self._received()

        def enough() -> bool:
            now = self._received()
            return min(now[0] - begin[0], now[1] - begin[1]) >= count

        what = f"{count} bytes more than {begin} (at the host, at the guest) arrive"
        try:
            self._host.wait_for(enough, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\nthe guest's end: {self._seen_by_guest()}") from error

    def finish(self) -> Result:
        """End the stream and check both directions at both ends; return what the host's end says."""
        self._host.terminate()
        status = self._host.wait()
        assert status == 0, self._host.describe(f"the host's end ended with {status}")
        host = Result.parse(self._host.output)
        status, output = self._guest.join(self._job)
        assert status == 0, f"the guest's end ended with {status}:\n{output[-1000:]}"
        guest = Result.parse(output)
        assert guest.received == host.sent
        assert host.received == guest.sent
        return host

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the host's end; the guest's ends with the guest."""
        self._host.end()
