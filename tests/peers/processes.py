"""Programs of other people, started and ended by a test.

Rules:
- A program never outlives its test: the test ends it, and if the test process dies first the kernel does (PDEATHSIG).
- Its output goes to a file, so that it never blocks on us, and an error shows the end of that file.
- Waiting is for a line of output or for the end of the program, always with a deadline, never for a guess of time.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

from tests.helpers import wait_until

PATIENCE = 60.0
"""How long a step of another program may take on a machine that is busy with other things, seconds."""
TAIL_BYTES = 3000


class Child(AbstractContextManager["Child"]):
    """One program: its output collects in a file, its input is a pipe.

    Leaving the context ends it: SIGTERM, and SIGKILL to its whole process group when it has not ended after `grace`.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        grace: float = 10.0,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start `command`; standard output and error go to the new file `log`, `env` is added to our environment."""
        self.command = [str(word) for word in command]
        self.name = Path(self.command[0]).name
        self.log = log
        self._grace = grace
        self._searched = 0
        with log.open("xb") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self.command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                pass_fds=pass_fds,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id; setpriv became the program, so there is no other process between."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """All it has printed so far."""
        return self.log.read_bytes().decode(errors="replace")

    def describe(self, what: str) -> str:
        """Make the text of an error: `what`, the command and the end of its output."""
        state = "running" if self.running else f"ended with {self._process.returncode}"
        return f"{what}\n{self.name} ({state}): {' '.join(self.command)}\n... {self.output[-TAIL_BYTES:]}"

    def send(self, text: str) -> None:
        """Write `text` to its standard input; AssertionError when it does not listen any more."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(text.encode())
            stdin.flush()
        except BrokenPipeError as error:
            raise AssertionError(self.describe(f"{self.name} takes no input: {text!r}")) from error

    def close_input(self) -> None:
        """Let it see the end of its standard input."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def expect(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait until what was printed since the last match matches `pattern`, and return that match.

        Raises AssertionError when the time is up, or when the program has ended without such output.
        """
        found: list[re.Match[str]] = []

        def look() -> bool:
            alive = self.running  # before the output is read: what it printed last must be seen
            match = re.compile(pattern, re.MULTILINE).search(self.output, self._searched)
            if match:
                found.append(match)
            elif not alive:
                raise AssertionError(self.describe(f"{self.name} ended, and never printed {pattern!r}"))
            return bool(match)

        self.wait_for(look, f"{self.name} prints {pattern!r}", timeout)
        self._searched = found[0].end()
        return found[0]

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
        """Wait until `condition` holds; the AssertionError when it does not shows this program's output."""
        try:
            wait_until(condition, timeout, what)
        except AssertionError as error:
            raise AssertionError(self.describe(str(error))) from error

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end and return the exit status, negative for a signal."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.describe(f"{self.name} did not end within {timeout:g} s")) from error

    def terminate(self) -> None:
        """Send SIGTERM, to this process alone."""
        if self.running:
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL, to this process alone, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """End it, by force if need be. May be called again."""
        self.close_input()
        if self.running:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace)
        with suppress(ProcessLookupError):  # the group may hold its children when it has ended itself
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it."""
        self.end()


def run(command: Sequence[str | Path], timeout: float = PATIENCE, *, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return its standard output; AssertionError with what it printed when it fails."""
    words = ["setpriv", "--pdeathsig", "KILL", "--", *(str(word) for word in command)]
    done = subprocess.run(
        words,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        raise AssertionError(f"exit status {done.returncode}: {' '.join(words[4:])}\n{done.stdout}{done.stderr}")
    return done.stdout
