"""How a class of a user's own is found, made, and let go of."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from vhostmp.errors import LocalError
from vhostmp.workers.backends import python_api
from vhostmp.workers.devices import api

TEXT = """
class Plain:
    def transmit(self, queue, packets): pass
    def receive(self, queue, budget): return ()

class Fails(Plain):
    def __init__(self): raise ValueError("not today")

class Device:
    def process(self, queue, requests): pass
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file with classes."""
    made = tmp_path / "classes.py"
    made.write_text(TEXT)
    return made


def own_modules() -> list[str]:
    """Return the modules that were made of files."""
    gc.collect()
    return [name for name in sys.modules if name.startswith("vhostmp_backend_")]


def test_module_goes_with_its_object(path: Path) -> None:
    """A device that is set up a thousand times, for one front-end after the other, keeps no thousand modules."""
    before = own_modules()
    instance = python_api.make(f"{path}:Plain", python_api.NET_METHODS)
    assert sys.modules[type(instance).__module__].Plain is type(instance)
    del instance
    assert own_modules() == before


@pytest.mark.parametrize("name", ["Fails", "Missing", "Device"])
def test_no_module_of_a_class_that_cannot_be_used(path: Path, name: str) -> None:
    """What cannot be started leaves no module."""
    before = own_modules()
    with pytest.raises(LocalError, match=r"not today|no class|no method"):
        python_api.make(f"{path}:{name}", python_api.NET_METHODS)
    assert own_modules() == before


def test_no_module_of_a_class_that_was_looked_at(path: Path) -> None:
    """To describe a device leaves no module."""
    before = own_modules()
    assert api.describe(f"{path}:Device")["num_queues"] == 1
    assert own_modules() == before


def test_changed_file_is_taken_up(path: Path) -> None:
    """Each object comes from the file as it is then."""
    first = python_api.make(f"{path}:Plain", python_api.NET_METHODS)
    path.write_text(TEXT.replace("return ()", "return [b'x' * 60]"))
    second = python_api.make(f"{path}:Plain", python_api.NET_METHODS)
    assert list(first.receive(0, 1)) == []
    assert list(second.receive(0, 1)) == [b"x" * 60]
