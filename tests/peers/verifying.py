"""A back-end written in Python, for the peer tests: it sends frames of known content and checks what comes back.

The guest is to send back on a queue pair what it receives there, unchanged and in order (testpmd's mode "io" on a
single port). So each frame crosses both rings, and is compared byte for byte with what was sent.

Rules: the instance lives in a worker; the test reads its tallies from the file that the environment variable
VHOSTMP_PEER_TALLIES names, one record for each queue pair. A queue pair is served by one worker at a time, and an
instance goes on from the tallies of the one before it. Frames of an earlier instance are known by their epoch: their
content is checked, their order is not, since what was under way when a worker was killed may be lost or come twice.
Nothing is sent before the test says `begin`: a driver throws away what it finds in its rings when it starts.
At most as many frames of a queue pair are under way as a ring of WINDOW_DESCRIPTORS holds, so that neither side has a
reason to drop one.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import ClassVar, Final

import attrs

TALLIES_VARIABLE: Final = "VHOSTMP_PEER_TALLIES"
SIZES_VARIABLE: Final = "VHOSTMP_PEER_SIZES"
WINDOW_DESCRIPTORS: Final = 192
_BUFFER_BYTES: Final = 2048
STALL_SECONDS: Final = 3.0
"""When no frame of a queue pair comes back for so long, those under way are counted as lost, and new ones go out."""
TICK_SECONDS: Final = 0.05
QUEUE_PAIRS_MAX: Final = 8
_BEGUN: Final = 0
"""Place in the file of the byte that says whether frames are to be sent; the tallies begin at _TALLIES."""
_TALLIES: Final = 8

_ETHERNET: Final = bytes.fromhex("02007e57aa02 02007e57aa01 88b5")  # 0x88b5: for local experiments (IEEE 802)
_HEAD: Final = struct.Struct("=14sIHHQ")
"""Ethernet header, epoch, queue pair, length of the whole frame in bytes, number of the frame from 0."""
_PATTERN: Final = random.Random(20100114).randbytes(1 << 17)
_FRAME_MAX: Final = 1 << 16
_STRIDE: Final = 40503  # odd: neighbours show different parts of the pattern


def make_frame(epoch: int, queue: int, number: int, sizes: tuple[int, int]) -> bytes:
    """Make frame `number`; its size, within `sizes` in bytes, and its content follow from the other arguments."""
    least, most = sizes
    size = least + number * 7919 % (most - least + 1)
    start = (number * _STRIDE + queue * 977 + epoch) % (len(_PATTERN) - _FRAME_MAX)
    return _HEAD.pack(_ETHERNET, epoch, queue, size, number) + _PATTERN[start : start + size - _HEAD.size]


@attrs.define
class Tally:
    """What became of the frames of one queue pair."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=7Q")

    sent: int = 0
    returned: int = 0
    """Came back as they were sent, and in order."""
    returned_bytes: int = 0
    late: int = 0
    """Came back as an earlier instance of the back-end had sent them."""
    wrong: int = 0
    """Came back with other content, or never were sent."""
    disorder: int = 0
    """Came back before one that was sent earlier, or a second time."""
    lost: int = 0

    @classmethod
    def load(cls, record: bytes) -> Tally:
        """Read one from the file."""
        return cls(*cls.FORMAT.unpack(record))

    def dump(self) -> bytes:
        """Make the record for the file."""
        return self.FORMAT.pack(*attrs.astuple(self))


def _place(queue: int) -> slice:
    """Say where in the file the tally of a queue pair is."""
    return slice(_TALLIES + queue * Tally.FORMAT.size, _TALLIES + (queue + 1) * Tally.FORMAT.size)


@attrs.define
class _Pair:
    """One queue pair, inside the worker."""

    tally: Tally
    next_number: int = 0
    expected: int = 0
    moved_at: float = attrs.field(factory=time.monotonic)


def _start_timer(seconds: float) -> int:
    """Return a timerfd that becomes readable every `seconds`; os has none before Python 3.13."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    interval = struct.pack("@4l", 0, int(seconds * 1e9), 0, int(seconds * 1e9))
    if fd < 0 or libc.timerfd_settime(fd, 0, interval, None):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return fd


class Verifying:
    """Sends frames to the guest and checks what the guest sends back."""

    def __init__(self) -> None:
        """Map the tallies and begin an epoch."""
        with open(os.environ[TALLIES_VARIABLE], "r+b") as file:
            self._map = mmap(file.fileno(), 0)
        least, _, most = os.environ[SIZES_VARIABLE].partition("-")
        self._sizes = (int(least), int(most))
        # A buffer for the header, and as many as the largest frame needs.
        self._window = WINDOW_DESCRIPTORS // (2 + (int(most) - 1) // _BUFFER_BYTES)
        self._epoch = int.from_bytes(os.urandom(4), "little")
        self._pairs: dict[int, _Pair] = {}
        self._timer = _start_timer(TICK_SECONDS)

    def fileno(self) -> int:
        """Return a descriptor that becomes readable at each tick: the first frames, and a fresh start after a loss."""
        return self._timer

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Check what came back."""
        pair = self._pair(queue)
        for packet in packets:
            self._check(queue, pair, bytes(packet))
        pair.moved_at = time.monotonic()
        self._write(queue, pair)

    def receive(self, queue: int, budget: int) -> Iterator[bytes]:
        """Send the next frames, as far as the window goes."""
        with suppress(BlockingIOError):
            os.read(self._timer, 8)
        if not self._map[_BEGUN]:
            return
        pair = self._pair(queue)
        under_way = pair.next_number - pair.expected
        if under_way and time.monotonic() - pair.moved_at > STALL_SECONDS:
            pair.tally.lost += under_way
            pair.expected = pair.next_number
            under_way = 0
        for _ in range(min(budget, self._window - under_way)):
            yield make_frame(self._epoch, queue, pair.next_number, self._sizes)
            if pair.next_number == pair.expected:
                pair.moved_at = time.monotonic()
            pair.next_number += 1
            pair.tally.sent += 1
        self._write(queue, pair)

    def close(self) -> None:
        """Let go of the file and the timer."""
        self._map.close()
        os.close(self._timer)

    def _pair(self, queue: int) -> _Pair:
        """Return a queue pair; the first time, with the tally that an earlier instance has left."""
        if queue not in self._pairs:
            self._pairs[queue] = _Pair(Tally.load(self._map[_place(queue)]))
        return self._pairs[queue]

    def _write(self, queue: int, pair: _Pair) -> None:
        """Bring the file up to date."""
        self._map[_place(queue)] = pair.tally.dump()

    def _check(self, queue: int, pair: _Pair, frame: bytes) -> None:
        """Compare one frame with what was sent."""
        tally = pair.tally
        if len(frame) < _HEAD.size:
            tally.wrong += 1
            return
        _, epoch, _, _, number = _HEAD.unpack_from(frame)
        if frame != make_frame(epoch, queue, number, self._sizes):
            tally.wrong += 1
        elif epoch != self._epoch:
            tally.late += 1
        elif not pair.expected <= number < pair.next_number:
            tally.disorder += 1
        else:
            tally.lost += number - pair.expected
            pair.expected = number + 1
            tally.returned += 1
            tally.returned_bytes += len(frame)


class Tallies:
    """The file of tallies, on the test's side."""

    def __init__(self, path: Path, sizes: tuple[int, int]) -> None:
        """Make the file, all numbers zero; frames will have `sizes`, the least and the largest, in bytes."""
        self._path = path
        self._sizes = sizes
        path.write_bytes(bytes(_place(QUEUE_PAIRS_MAX - 1).stop))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to find the file."""
        return {TALLIES_VARIABLE: str(self._path), SIZES_VARIABLE: "{}-{}".format(*self._sizes)}

    def read(self, queue_pairs: int) -> list[Tally]:
        """Return what became of the frames of the first `queue_pairs` queue pairs."""
        content = self._path.read_bytes()
        return [Tally.load(content[_place(queue)]) for queue in range(queue_pairs)]

    def begin(self, begun: bool = True) -> None:
        """Have frames sent, or no new ones."""
        with self._path.open("r+b") as file:
            file.seek(_BEGUN)
            file.write(bytes([begun]))

    def check(self, queue_pairs: int) -> None:
        """No frame came back changed, none came back out of turn, and none is missing."""
        tallies = self.read(queue_pairs)
        print(*tallies, sep="\n")
        for tally in tallies:
            assert (tally.wrong, tally.disorder, tally.lost) == (0, 0, 0), tally


SPEC: Final = f"python:{Path(__file__).resolve()}:{Verifying.__name__}"
