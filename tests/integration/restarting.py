"""A server that is killed and started again, with the same options: by a test, or by itself at places in its code."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests import helpers
from tests.integration.serving import Served, ask, quieten, serving
from vhostmp.fdstore import find_holder
from vhostmp.killpoints import VARIABLE
from vhostmp.workers.channel import close_all

ADOPT_SECONDS: Final = "20"


class Restarting:
    """`vhostmp serve` with a control path, over any number of lives."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        socket: str = "s",
        adopt_timeout: str = ADOPT_SECONDS,
        is_relative: bool = False,
    ) -> None:
        """Start it. With `is_relative` it is told the socket's path from `folder`, where we are then."""
        self.folder: Final = folder
        self.socket: Final = folder / socket
        self.control: Final = folder / "c"
        self.options: Final = (
            *("--socket-path", socket if is_relative else str(self.socket), "--control-path", str(self.control)),
            *("--adopt-timeout", adopt_timeout, *options),
        )
        self.lives: list[Served] = []
        self._stack = contextlib.ExitStack()
        self.start()

    def start(self, *more: str) -> Served:
        """Start it, once more, with `more` options for this life."""
        self.lives.append(self._stack.enter_context(serving(self.folder, *self.options, *more)))
        return self.child

    @property
    def child(self) -> Served:
        """The process that serves now, or did last."""
        return self.lives[-1]

    def kill(self) -> None:
        """SIGKILL the control process, and wait for its end."""
        os.kill(self.child.pid, signal.SIGKILL)
        helpers.wait_until(lambda: not self.child.running)

    def again(self, *more: str) -> None:
        """Kill it, and start it again, with `more` options for this life."""
        self.kill()
        self.start(*more)

    def show(self) -> Any:
        """Return what `vhostmp show` says."""
        return ask("show", self.control)

    def descriptors(self) -> int:
        """Return how many descriptors the control process has, with those of a spare worker and nobody asking."""
        helpers.wait_until(lambda: self.show()["spare"], what="a spare worker")
        quieten(self.control)
        return self.child.descriptors()

    def held(self) -> int:
        """Return how many descriptors the holder has, once it has done all that the control process has told it."""
        found = find_holder(str(self.control), look=True)
        assert found is not None
        close_all(found[1].values())
        found[0].goodbye()  # which returns when it has hung up
        return len(os.listdir(f"/proc/{self.holder()}/fd"))

    def holder(self) -> int:
        """Return the process that holds the descriptors."""
        return helpers.process_with(f"{self.control}.hold")

    def end(self) -> None:
        """End it in order: status 0, nothing left beside it, nothing internal in its logs."""
        assert self.child.terminate_in_time() == 0, self.child.output
        for log in self.folder.glob("serve.*.log"):  # of those lives too that did not get ready
            text = log.read_text()
            assert "Traceback" not in text, text
            assert "internal error" not in text, text
        left = {path.name for path in self.folder.iterdir() if not path.name.startswith("serve.")}
        assert not left & {"c", "c.hold", self.socket.name}, left

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, however the test went, without anything that waits for another life."""
        if error is not None:
            for life in self.lives:
                print(life.output)
        self._stack.close()
        for pid in helpers.process_table():
            if f"{self.control}.hold" in helpers.command_line(pid):
                os.kill(pid, signal.SIGKILL)


class Reviving:
    """Starts a server again whenever it has died, each time to be killed at the next of some places; in a thread."""

    def __init__(self, server: Restarting, places: Iterable[str]) -> None:
        """Begin once the server dies; `places`: what VHOSTMP_KILL_AT is to be in each life."""
        self.server: Final = server
        self.deaths = 0
        self.error: BaseException | None = None
        self._places: Iterator[str] = iter(places)
        self._stop = threading.Event()
        self._exhausted = threading.Event()
        self._rests = False
        self._thread: Final = threading.Thread(target=self._run, name="reviving")

    @property
    def is_exhausted(self) -> bool:
        """Whether the places have all been used; what went wrong is raised."""
        if self.error is not None:
            raise self.error
        return self._exhausted.is_set()

    def rest(self) -> None:
        """Start nothing any more; what runs is to be ended before the context is left."""
        self._rests = True

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self._rests or self.server.child.running:
                    self._stop.wait(0.002)
                    continue
                self.deaths += 1
                place = next(self._places, None)
                if place is None:
                    self._exhausted.set()
                    os.environ.pop(VARIABLE, None)
                else:
                    os.environ[VARIABLE] = place
                with contextlib.suppress(AssertionError):  # it may die before it is ready
                    self.server.start()
        except BaseException as error:
            self.error = error
        finally:
            os.environ.pop(VARIABLE, None)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Start nothing any more. What was started last belongs to this thread: it must live until that has ended."""
        self._stop.set()
        self._thread.join(60)
        if self.error is not None and error is None:
            raise self.error
