"""A worker that dies while it publishes on a packed ring, at any store, leaves nothing half done for good.

A child process publishes one batch, instruction by instruction under ptrace; each state that ring and slot go through,
as the compiled code really writes them, is an *image*: what a death at that place leaves. A replacement that attaches
to it must give the driver each chain once, in order, and go on.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from tests import native
from tests.oracle.rig import PackedRig
from tests.oracle.split import WRITABLE
from tests.oracle.test_burst import BURST_SOURCE
from vhostmp.shm import layout
from vhostmp.tools.stress.packed import WRAP
from vhostmp.tools.stress.ring import F_RING_PACKED

Image = tuple[bytes, bytes, bytes]
PTRACE_TRACEME: Final = 0
PTRACE_CONT: Final = 7
PTRACE_SINGLESTEP: Final = 9
#: Descriptors and bytes of the chains of a batch.
SIZES: Final = (1, 3, 1, 2)
ROOM: Final = 64
NUM: Final = 9

#: What steps through a child cannot be done everywhere.
STEPPED: Final = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="single steps are tried on x86-64 only"),
    pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer has too many steps"),
]
pytestmark = STEPPED


@functools.cache
def burst_ring() -> Any:
    """Return the compiled class; loaded before anything is stepped through, since that is a million instructions."""
    return native.load(BURST_SOURCE).BurstRing


class Scene:
    """A ring whose driver has made a batch available, and its slot; the device's side is made by `attach`."""

    def __init__(self, first_idx: int, *, region: bool = False) -> None:
        """Set it up the same each time; with `region`, the front-end keeps what is in flight."""
        burst_ring()
        self.rig = PackedRig("cython", NUM, first_idx=first_idx)
        self.slot = mmap.mmap(-1, layout.RING.size)  # shared with children
        self.region = mmap.mmap(-1, 32 + 32 * NUM) if region else None
        self.first_idx = first_idx
        self.ids = [self.add(size) for size in SIZES]
        self.rig.driver.publish()

    def add(self, size: int) -> int:
        """Make a chain of so many descriptors."""
        return self.rig.driver.add([], [(self.rig.data, ROOM)] * size)

    def attach(self, *, resume: bool) -> Any:
        """Return a device side."""
        rig = self.rig
        places = rig.driver.desc_gpa, rig.driver.avail_gpa, rig.driver.used_gpa
        return burst_ring()(
            rig.mem,
            NUM,
            *places,
            features=F_RING_PACKED,
            last_avail_idx=self.first_idx,
            slot=self.slot,
            resume=resume,
            region=self.region,
        )

    def serve(self, ring: Any, length: int) -> int:
        """Take what there is, give all of it back with that length and publish. Returns how many chains."""
        taken = ring.fetch(64, WRITABLE)
        ring.give_back([(head, length) for head, _, _ in taken], ring.sizes())
        ring.publish()
        return len(taken)

    def image(self) -> Image:
        """Everything that a death leaves."""
        return self.rig.ring_bytes(), self.slot[:], b"" if self.region is None else self.region[:]

    def restore(self, image: Image) -> None:
        """Go back to an image. The drivers's wish and books are not part of it."""
        self.rig.regions[0].buf[: self.rig.layout.end] = image[0]
        self.slot[:] = image[1]
        if self.region is not None:
            self.region[:] = image[2]

    def close(self) -> None:
        """Let go of everything."""
        self.rig.close()


@contextmanager
def scene(first_idx: int, *, region: bool = False) -> Generator[Scene]:
    """Make one and close it."""
    one = Scene(first_idx, region=region)
    try:
        yield one
    finally:
        one.close()


def step_through(one: Scene, act: Callable[[], object]) -> list[Image]:
    """Run `act` in a child, instruction by instruction, and return the images that it goes through."""
    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid == 0:
        try:
            libc.ptrace(PTRACE_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            act()
        finally:
            os._exit(0)
    images = [one.image()]
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        pytest.skip("no ptrace here")
    while os.WIFSTOPPED(status):
        if libc.ptrace(PTRACE_SINGLESTEP, pid, None, None):
            pytest.skip("no ptrace here")
        _, status = os.waitpid(pid, 0)
        if (now := one.image()) != images[-1]:
            images.append(now)
    return images


@functools.cache
def images_of_a_publication(first_idx: int, *, region: bool = False) -> list[Image]:
    """Return what a publication of the batch goes through, from giving back on."""
    with scene(first_idx, region=region) as one:
        ring = one.attach(resume=False)
        taken = ring.fetch(64, WRITABLE)
        sizes = ring.sizes()
        assert sizes == list(SIZES)

        def act() -> None:
            ring.give_back([(head, 40 + head) for head, _, _ in taken], sizes)
            ring.publish()

        return step_through(one, act)


def check_goes_on(one: Scene, image: Image, attach: Callable[[], Any], *, driver_runs: bool) -> bool:
    """Attach to an image and go on. Returns whether the batch was finished rather than taken anew."""
    one.restore(image)
    seen = one.rig.driver.reap() if driver_runs else []
    if seen:
        one.add(2)  # into the place of what was used
        one.rig.driver.publish()
    ring = attach()
    served = one.serve(ring, 1)
    finished = served < len(SIZES)
    assert served == (bool(seen) if finished else len(SIZES)), "some chains were taken again, others not"
    seen += one.rig.driver.reap()
    expected = [(head, 40 + head if finished else 1) for head in one.ids]
    assert [(used.chain.head, used.length) for used in seen][: len(SIZES)] == expected
    check_serves(one, ring)
    return finished


def check_serves(one: Scene, ring: Any) -> None:
    """Have a device side serve some more, several rounds of the ring."""
    for _ in range(3 * NUM):
        one.add(2)
        one.rig.driver.publish()
        assert one.serve(ring, 5) == 1
        assert [used.length for used in one.rig.driver.reap()] == [5]
    one.rig.driver.check_idle()


@pytest.mark.parametrize("driver_runs", [False, True], ids=["driver_sleeps", "driver_runs"])
@pytest.mark.slow
@pytest.mark.parametrize("first_idx", [WRAP, 5], ids=hex)
def test_death_at_every_store(first_idx: int, driver_runs: bool) -> None:
    """Wherever the worker dies, each chain reaches the driver once; before the batch is marked all are taken anew."""
    images = images_of_a_publication(first_idx)
    assert len(images) > 3 * len(SIZES)
    outcomes: list[bool] = []
    for image in images:
        with scene(first_idx) as one:
            outcomes.append(check_goes_on(one, image, lambda: one.attach(resume=True), driver_runs=driver_runs))
    assert outcomes == sorted(outcomes), "what was begun is finished from the mark on"
    assert not outcomes[0]
    assert outcomes[-1]


@pytest.mark.slow
def test_second_death() -> None:
    """A replacement that dies while it finishes the batch leaves what the next one can finish."""
    first_idx = 5
    marked = [image for image in images_of_a_publication(first_idx) if layout.RING.read(image[1], 0, "batch_n")]
    with scene(first_idx) as one:
        ring = one.attach(resume=True)
        one.restore(marked[2])
        again = step_through(one, ring.attach)
    assert len(again) > len(SIZES)
    for second in again:
        with scene(first_idx) as one:
            check_goes_on(one, second, lambda: one.attach(resume=True), driver_runs=False)
