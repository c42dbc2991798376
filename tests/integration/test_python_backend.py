"""Back-ends written in Python are found, or refused, when they are named; a changed file is taken up by a swap."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, NoReturn

import pytest

from tests.frames import make_frame
from tests.helpers import wait_until
from tests.net_driver import Guest
from vhostmp import renewal
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.workers import imported
from vhostmp.workers.imported import TICK_NS

BACKENDS: Final = Path(__file__).with_name("backends.py")
SOURCE: Final = """
class Good:
    def transmit(self, queue, packets):
        pass

    def receive(self, queue, budget):
        return ()

class Deaf:
    def transmit(self, queue, packets):
        pass
"""


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("none.py:Good", "does not exist"),
        ("backend.py:None", "there is no class None"),
        ("backend.py:Deaf", "has no method receive"),
        ("broken.py:Good", "does not import: ZeroDivisionError"),
        ("lacking.py:Good", "No module named 'nosuch': is it installed for .*, or in PYTHONPATH"),
        ("deadly.py:Good", "while it imported"),
    ],
)
def test_mistake_is_found_at_once(pool: Pool, tmp_path: Path, reference: str, why: str) -> None:
    """A back-end that no worker could make is refused in one line, at the start and by a swap, with no guest there."""
    (tmp_path / "backend.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "lacking.py").write_text("import nosuch")
    (tmp_path / "deadly.py").write_text("import os; os._exit(3)")
    spec = f"python:{tmp_path}/{reference}"
    with pytest.raises(LocalError, match=why) as caught:
        NetDevice(pool, backend=spec)
    assert "\n" not in str(caught.value)
    device = NetDevice(pool, backend="loopback")
    with pytest.raises(LocalError, match=why):
        device.set_backend(spec)
    assert device.backend == "loopback"


def test_changed_file_is_taken_up(pool: Pool, tmp_path: Path) -> None:
    """Each time a back-end is named its file is read again."""
    file = tmp_path / "backend.py"
    file.write_text("class Wrong: pass")
    device = NetDevice(pool, backend="loopback")
    with pytest.raises(LocalError, match="no class Good"):
        device.set_backend(f"python:{file}:Good")
    file.write_text(SOURCE)
    device.set_backend(f"python:{file}:Good")
    assert device.backend == f"python:{file}:Good"


def pids(pool: Pool) -> list[int]:
    """Return the workers' process ids."""
    return [worker.pid for worker in pool.workers]


def test_what_is_imported_is_swapped_to_at_once(tmp_path: Path) -> None:
    """A reference whose files are what they were takes no new processes, whatever was served in between."""
    file = tmp_path / "backend.py"
    file.write_text(SOURCE)
    time.sleep(2 * TICK_NS / 1e9)  # a file that is as young as its import may be another one
    with Pool(workers=2) as pool:
        device = NetDevice(pool, queue_pairs=2)
        before = pids(pool)
        device.set_backend(f"python:{file}:Good")
        after = pids(pool)
        assert not set(after) & set(before)
        for spec in ("loopback", f"python:{file}:Good", "null", f"python:{file}:Good", f"python:{file}:Good"):
            device.set_backend(spec)
            assert pids(pool) == after, spec
        with pytest.raises(LocalError, match="no method receive"):
            device.set_backend(f"python:{file}:Deaf")


@pytest.mark.parametrize("changed", ["backend.py", "helper_of_backend.py"])
def test_change_under_an_old_time_is_taken_up(pool: Pool, tmp_path: Path, changed: str) -> None:
    """A file that has changed, the back-end's own or one that it imports, is taken up, whatever its time says."""
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    (tmp_path / "backend.py").write_text(path + "import helper_of_backend\n" + SOURCE)
    (tmp_path / "helper_of_backend.py").write_text("")
    time.sleep(2 * TICK_NS / 1e9)
    device = NetDevice(pool)
    spec = f"python:{tmp_path}/backend.py:Good"
    device.set_backend(spec)
    first = pids(pool)
    device.set_backend(spec)
    assert pids(pool) == first
    file = tmp_path / changed
    was = file.stat()
    file.write_text(file.read_text())
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    device.set_backend(spec)
    assert pids(pool) != first
    file.unlink()
    if changed == "backend.py":
        with pytest.raises(LocalError, match="does not exist"):
            device.set_backend(spec)
    else:
        with pytest.raises(LocalError, match="does not import: ModuleNotFoundError"):
            device.set_backend(spec)


def test_two_that_take_turns(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of one class stays known when another one is imported; no worker that serves is asked."""
    specs: list[str] = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(SOURCE)
        specs.append(f"python:{tmp_path}/{name}.py:Good")
    time.sleep(2 * TICK_NS / 1e9)
    device = NetDevice(pool)
    for spec in specs:
        device.set_backend(spec)
    after = pids(pool)

    def nobody(*_: object) -> NoReturn:
        raise AssertionError("a worker was asked")

    monkeypatch.setattr(renewal, "ask", nobody)
    for spec in 2 * specs:
        device.set_backend(spec)
    assert pids(pool) == after


@pytest.mark.parametrize("follows", ["file", "folder"])
def test_path_that_leads_elsewhere_since(pool: Pool, tmp_path: Path, follows: str) -> None:
    """A symbolic link that is set anew while its file is imported: the next swap takes what it leads to then."""
    link = tmp_path / ("link.py" if follows == "file" else "link")
    for version in ("old", "new"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "backend.py").write_text(SOURCE)
    target = "{}/backend.py" if follows == "file" else "{}"
    anew = f"import os; os.symlink({target.format('new')!r}, {str(link)!r} + '.new')\n"
    anew += f"os.rename({str(link)!r} + '.new', {str(link)!r})\n"
    spec = f"python:{link}:Good" if follows == "file" else f"python:{link}/backend.py:Good"
    (tmp_path / "old" / "backend.py").write_text(anew + SOURCE)
    link.symlink_to(target.format("old"))
    time.sleep(2 * TICK_NS / 1e9)
    device = NetDevice(pool)
    device.set_backend(spec)
    first = pids(pool)
    assert str(link.readlink()) == target.format("new")
    device.set_backend(spec)
    assert pids(pool) != first


def test_more_files_than_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would not fit into a message is not known."""
    monkeypatch.setattr(imported, "_files", {f"/{number:0100}": [1 << 60, 1 << 20, 1 << 30] for number in range(400)})
    assert imported.noted() is not None
    monkeypatch.setattr(imported, "_files", {f"/{number:0100}": [1 << 60, 1 << 20, 1 << 30] for number in range(500)})
    assert imported.noted() is None


def test_clumsy_backend(pool: Pool) -> None:
    """Whatever a back-end raises, and whoever looks at it, each packet's chain comes back and none is lost."""
    device = NetDevice(pool, backend=f"python:{BACKENDS}:Clumsy")
    with Guest(device, num=64) as guest:
        (pair,) = guest.pairs
        for turn in range(100):
            pair.post()
            assert pair.send(make_frame(turn, 60))
            pair.kick()
            wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what=pair.describe())
            pair.receive()
        device.set_backend("loopback")
        while pair.rx.pending():
            pair.receive()
        pair.post()
        pair.kick()
        for number in range(64):  # as many as there are buffers: each of them is there
            assert pair.send(make_frame(number, 60))
        pair.kick()
        got: list[bytes] = []

        def all_there() -> bool:
            got.extend(pair.receive())
            return len(got) == len(range(64))

        wait_until(all_there, what=pair.describe())
        assert [queue["broken"] for queue in device.snapshot()["queues"]] == [None, None]
        assert pool.restarts == 0


def test_failures_are_one_line(pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A back-end that fails on each frame is one line with what to do, from all of its queue pairs; `drops` counts."""
    (tmp_path / "late.py").write_text(SOURCE.replace("pass", "open('/dev/null')", 1))
    with closing(NetDevice(pool, backend=f"python:{tmp_path}/late.py:Good", queue_pairs=2)) as device:
        with Guest(device, pairs=2) as guest:
            for number in range(1, 6):
                for index, pair in enumerate(guest.pairs):
                    assert pair.send(make_frame(number, 60))
                    pair.kick()
                    wait_until(
                        lambda index=index, number=number: (  # type: ignore[misc]
                            device.snapshot()["queues"][2 * index + 1]["drops"] == {"backend_error": number}
                        ),
                        what="the drop",
                    )
        lines = [record.getMessage() for record in caplog.records if record.name == "vhostmp.backend"]
    assert lines == [
        "device 0: Good: transmit: PermissionError: [Errno 1] Operation not permitted: '/dev/null' "
        "(sandbox: open or import it at the top of the module, or --sandbox off)"
    ]


def test_class_that_does_not_start(pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error in the log says so when a guest needs an object, and `show` goes on saying it until there is one."""
    source = SOURCE.replace("class Good:", "class Good:\n    def __init__(self): 1 / 0", 1)
    (tmp_path / "late.py").write_text(source)
    with closing(NetDevice(pool)) as device, Guest(device) as guest:
        for index in range(2):
            device.stop_vring(index)
        device.set_backend(f"python:{tmp_path}/late.py:Good")
        assert device.snapshot()["refused"] is None
        why = f"python back-end '{tmp_path}/late.py:Good' does not start: ZeroDivisionError: division by zero"
        with pytest.raises(LocalError, match="does not start"):
            guest.start(0, 0)
        found = wait_until(lambda: [one for one in caplog.records if one.name == "vhostmp.backend"], what="the error")
        record = found[0]
        assert (record.levelname, record.getMessage()) == ("ERROR", f"device 0: {why}")
        assert "def __init__(self): 1 / 0" in caplog.text
        assert device.snapshot()["refused"] == why
        device.set_backend("loopback")
        assert device.snapshot()["refused"] is None
