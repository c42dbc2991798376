"""Our side: a NetDevice with a tap, in a pool with one worker, by its verbs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from tests.kernel.arena import Arena, Tap, empty
from tests.kernel.case import RingPlan, Step
from tests.kernel.verbs import descriptor, regions, ring_addresses, ring_descriptor
from vhostmp.errors import VhostError
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.shm.memory import MemoryRegion
from vhostmp.supervisor import Pool

IDLE_SECONDS: Final = 60.0
#: Polls without a work item after which a worker has looked at its events twice (workers/_loop.pyx: every 32nd).
POLLS_IDLE: Final = 100


class Ours:
    """A NetDevice. The methods that are verbs take the step and where its ring lies."""

    def __init__(self, arena: Arena, pool: Pool, name: str) -> None:
        """Make it, with a tap of that name."""
        self._arena: Final = arena
        self._pool: Final = pool
        self._device: Final = NetDevice(pool, backend=f"tap:{name}", name="oracle", offloads=True)
        self._tap_fd: Final = _tap_fd(name)
        self.tap: Final = Tap(name)

    def forget(self) -> None:
        """Do what happens when a front-end is gone."""
        self._device.stop_all()
        empty(self._tap_fd)

    def wait_idle(self) -> None:
        """Have the worker wake up twice from here on, and wait until it sleeps again.

        What was kicked before is in what the second wake-up looks at: the first may have begun before. A nudge that
        meets a worker awake counts for nothing, hence one each time that it is seen asleep. A worker that polls, for
        want of a kick fd, never sleeps: it is idle when it has polled often enough to look at its events twice, and
        has run no work item since.
        """
        (worker,) = self._pool.workers
        wanted = self._worker_word("wakeups") + 2
        items, polls = -1, 0
        deadline = time.monotonic() + IDLE_SECONDS
        while self._worker_word("wakeups") < wanted or not self._worker_word("asleep"):
            if self._worker_word("asleep"):
                worker.nudge()
            if items != (items := self._worker_word("items")):
                polls = self._worker_word("polls")
            if self._worker_word("polls") - polls > POLLS_IDLE:
                return
            if time.monotonic() > deadline:
                raise AssertionError("the worker does not come to rest")
            time.sleep(0)

    def _worker_word(self, name: str) -> int:
        return layout.WORKER.read(self._pool.buf, layout.worker_offset(0), name)

    def verb(self, step: Step, plan: RingPlan) -> int | None:
        """Carry out a verb."""
        try:
            result: int | None
            if hasattr(self, step.name):
                result = getattr(self, step.name)(step, plan)
            elif step.name in ("set_vring_kick", "set_vring_call", "set_vring_err"):
                result = getattr(self._device, step.name)(step.ring, ring_descriptor(self._arena, step))
            elif step.name.startswith("set_vring_"):
                result = getattr(self._device, step.name)(step.ring, step.value)
            else:
                result = getattr(self._device, step.name)()
        except VhostError as error:
            raise OSError(error.errno, str(error)) from error
        return result

    def set_features(self, step: Step, _plan: RingPlan) -> None:
        """set_features."""
        self._device.set_features(step.value)

    def set_mem_table(self, step: Step, _plan: RingPlan) -> None:
        """set_mem_table."""
        memory = self._arena.memory
        table = [
            MemoryRegion(gpa=gpa, size=size, uva=memory.address + offset, fd=memory.fd, mmap_offset=offset)
            for gpa, size, offset in regions(step.value)
        ]
        self._device.set_mem_table(table)

    def set_log_base(self, _step: Step, _plan: RingPlan) -> None:
        """set_log_base."""
        self._device.set_log_base(self._arena.log.fd, self._arena.log.size, 0)

    def set_log_fd(self, step: Step, _plan: RingPlan) -> None:
        """set_log_fd."""
        self._device.set_log_fd(descriptor(self._arena, self._arena.log_fd, step.value))

    def set_vring_addr(self, step: Step, plan: RingPlan) -> None:
        """set_vring_addr."""
        self._device.set_vring_addr(step.ring, **ring_addresses(self._arena, plan, step.value))

    def get_vring_base(self, step: Step, _plan: RingPlan) -> int:
        """get_vring_base."""
        return self._device.get_vring_base(step.ring)

    def start(self, step: Step, _plan: RingPlan) -> None:
        """start_vring, of a ring that is enabled."""
        self._device.set_vring_enable(step.ring, True)
        self._device.start_vring(step.ring)

    def stop(self, step: Step, _plan: RingPlan) -> None:
        """stop_vring."""
        self._device.stop_vring(step.ring)


def _tap_fd(name: str) -> int:
    """Return our own process's descriptor of a tap."""
    for entry in Path("/proc/self/fdinfo").iterdir():
        try:
            text = entry.read_text()
        except FileNotFoundError:
            continue  # that of the directory itself
        if f"iff:\t{name}\n" in text:
            return int(entry.name)
    raise AssertionError(f"no descriptor of {name}")
