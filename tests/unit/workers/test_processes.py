"""Workers that answer late, never, without end, or nonsense: what that costs whoever asks, and the other workers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import pytest

from tests.helpers import process_alive, wait_until
from vhostmp.errors import WorkerDied
from vhostmp.flush import retire
from vhostmp.parts import BackendPart, DeviceState, RingState
from vhostmp.workers import leftover
from vhostmp.workers.channel import FDS_MAX, Channel, Message, close_all
from vhostmp.workers.processes import WorkerProcess, answer_to, take_inventories

TIMEOUT: Final = 2.0
#: What may come on top of the time that workers have, on a machine that is busy, seconds: less than what it takes to
#: wait for one worker after the other, of as many as there are in the tests.
MORE: Final = 20.0
HELD: Final = [3, 5]

Behaviour = Callable[[Channel], None]


def honest(channel: Channel) -> None:
    """Answer what is asked, after an answer to somebody who has died."""
    channel.send({"late": True})
    while True:
        message, fds = channel.receive()
        close_all(fds)
        channel.send({"token": message.get("token"), "parts": HELD, "groups": [[0], []]})


def silent(channel: Channel) -> None:
    """Take questions, and answer none."""
    while True:
        close_all(channel.receive()[1])


def endless(channel: Channel) -> None:
    """Answer whatever nobody has asked, all the time."""
    while True:
        channel.send({"token": "nobody's"})


def slow(channel: Channel) -> None:
    """Answer each question, and never within half of the time."""
    while True:
        close_all(channel.receive()[1])
        time.sleep(0.7 * TIMEOUT)
        channel.send({})


def deaf(channel: Channel) -> None:
    """Take no question, and leave no room for one."""
    del channel


def wrong(channel: Channel) -> None:
    """Answer, and with nothing that one could hold."""
    message, _ = channel.receive()
    channel.send({"token": message["token"], "parts": [[1]], "groups": 7})


def claiming(parts: object, groups: object) -> Behaviour:
    """Return who says that it holds these."""

    def behave(channel: Channel) -> None:
        message, _ = channel.receive()
        channel.send({"token": message["token"], "parts": parts, "groups": groups})

    return behave


class Workers:
    """Workers of which a thread of ours is the channel's other end, and a process that sleeps is the process."""

    def __init__(self) -> None:
        """Have none."""
        self.all: list[WorkerProcess] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._theirs: list[Channel] = []
        self._threads: list[threading.Thread] = []

    def add(self, behaviour: Behaviour) -> WorkerProcess:
        """Start one that behaves so."""
        ours, theirs = Channel.pair()
        child = subprocess.Popen(["sleep", "100"])
        worker = WorkerProcess(len(self.all), child.pid, os.pidfd_open(child.pid), ours, os.eventfd(0, os.EFD_NONBLOCK))
        if behaviour is deaf:
            ours.limit(0.01)
            with contextlib.suppress(WorkerDied):
                while True:
                    ours.send({"junk": "x" * 10000})

        def run() -> None:
            with contextlib.suppress(WorkerDied):
                behaviour(theirs)

        self.all.append(worker)
        self._children.append(child)
        self._theirs.append(theirs)
        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        return worker

    def close(self) -> None:
        """End all of them."""
        for child in self._children:
            child.kill()
            child.wait()
        for channel in (*self._theirs, *(worker.channel for worker in self.all)):
            channel.cut()
        for thread in self._threads:
            thread.join()
        for channel in self._theirs:
            channel.close()
        for worker in self.all:
            worker.close()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Return workers, with less time for answers than usual."""
    monkeypatch.setattr("vhostmp.workers.processes.ANSWER_TIMEOUT", TIMEOUT)
    with contextlib.closing(Workers()) as made:
        yield made


@pytest.mark.slow
def test_an_adoption_waits_for_all_at_once(workers: Workers) -> None:
    """However many answer nothing, or without end, they cost what one costs, and the honest ones are heard."""
    doomed = [workers.add(behaviour) for behaviour in (silent, endless, wrong, silent, endless, slow, deaf) * 2]
    assert len(doomed) * TIMEOUT > TIMEOUT + MORE
    good = [workers.add(honest) for _ in range(2)]
    begun = time.monotonic()
    assert take_inventories(workers.all) == {worker.index for worker in good}
    assert time.monotonic() - begun < TIMEOUT + MORE
    assert [(worker.parts, worker.groups) for worker in good] == [(set(HELD), {3: {0}})] * 2
    wait_until(lambda: not any(process_alive(worker.pid) for worker in doomed))
    assert all(worker.alive for worker in good)


@pytest.mark.parametrize(
    ("parts", "groups"),
    [
        (HELD, [[0, "x", None], []]),
        (HELD, [[0], [True]]),
        (HELD, [[0], {"1": 2}]),
        (HELD, [[0], "12"]),
        (HELD, [[0]]),
        (HELD, None),
        ([3, "5"], [[0], []]),
        ([3.0, 5], [[0], []]),
        ({"3": 5}, [[0]]),
    ],
)
def test_a_worker_that_holds_what_is_no_number(workers: Workers, parts: object, groups: object) -> None:
    """Whoever claims to hold anything but numbers is killed, and nothing of what it said is believed: verbs sort it."""
    bad, good = workers.add(claiming(parts, groups)), workers.add(honest)
    assert take_inventories(workers.all) == {good.index}
    assert (bad.parts, bad.groups) == (set(), {})
    wait_until(lambda: not process_alive(bad.pid))


def test_a_spawner_that_says_other_things(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer with the token is waited for once, whatever comes instead."""
    monkeypatch.setattr("vhostmp.workers.processes.ANSWER_TIMEOUT", 0.1)
    worker = workers.add(endless)
    begun = time.monotonic()
    with pytest.raises(WorkerDied, match="no answer within"):
        answer_to(worker.channel, "ours")
    assert time.monotonic() - begun < MORE


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", [silent, deaf])
def test_a_verb_waits_for_all_at_once(workers: Workers, behaviour: Behaviour) -> None:
    """A verb that asks many workers, each of which takes its time, takes no longer than one that asks one."""
    count = 20
    doomed = [workers.add(behaviour) for _ in range(count)]
    good = workers.add(honest)
    state = DeviceState(BackendPart(fds=()), (RingState(),), (0,), 1)
    begun = time.monotonic()
    assert retire(Place(), 1, state, state, workers.all) == {}
    assert time.monotonic() - begun < 2 * TIMEOUT + MORE < count * TIMEOUT
    wait_until(lambda: not any(process_alive(worker.pid) for worker in doomed))
    assert good.alive


def handing_out(answer: Message, make: Callable[[], int]) -> Behaviour:
    """Return who answers so, with as many of certain files as a message can have, or as are named."""

    def behave(channel: Channel) -> None:
        close_all(channel.receive()[1])
        left = cast("list[object]", answer["left"]) if isinstance(answer["left"], list) else []
        fds = [make() for _ in range(len(left) or FDS_MAX)]
        channel.send(answer, fds)
        close_all(fds)

    return behave


def a_frame() -> int:
    """Return a file of frames."""
    return leftover.to_file([b"frame"])


@pytest.mark.parametrize(
    ("left", "make"),
    [
        ([], a_frame),
        (5, a_frame),
        (None, a_frame),
        ([0, 0], a_frame),
        ([1], a_frame),
        ([[0]], a_frame),
        (["0"], a_frame),
        ([False], a_frame),
        ([0], lambda: os.open("/proc/self/status", os.O_RDONLY)),
    ],
)
def test_files_that_nobody_asked_for(workers: Workers, left: Any, make: Callable[[], int]) -> None:
    """Files that go with no answer of a worker of ours are closed, however many they are; the verb goes on."""
    worker = workers.add(handing_out({"left": left}, make))
    backend = BackendPart(fds=())
    worker.parts, worker.groups = {backend.id}, {backend.id: {0}}
    state = DeviceState(backend, (RingState(),), (0,), 1)
    before = os.listdir("/proc/self/fd")
    assert retire(Place(), 1, state, None, workers.all) == {}
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= len(before), what="the worker's own to be closed")


def test_files_of_frames(workers: Workers) -> None:
    """Each group's file comes from the worker that lost the group: no other one's takes its place."""
    backend = BackendPart(fds=())
    for _ in range(2):
        worker = workers.add(handing_out({"left": [0]}, a_frame))
        worker.parts, worker.groups = {backend.id}, {backend.id: {worker.index}}
    state = DeviceState(backend, (RingState(),), (0,), 1)
    before = os.listdir("/proc/self/fd")
    left = retire(Place(), 1, state, None, workers.all)
    assert {group: leftover.from_file(fd) for group, fd in left.items()} == {0: [b"frame"]}
    close_all(left.values())
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= len(before), what="the workers' own to be closed")


class Place:
    """Where a device is."""

    name: str = "0"
    slot = 0
    first_ring = 0
    num_queues = 1
