"""The command line in one process: help, mistakes in one line, what needs no server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import told
from vhostmp import __version__, cli, show


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command; return status, stdout, stderr."""
    status = cli.main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("words", [[], ["serve"], ["swap"], ["show"], ["workers"], ["qemu-args"]])
def test_help(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """Every command has a help, on stdout, status 0: below the usage a sentence that says what it does, an example."""
    status, out, err = run(*words, "--help", capsys=capsys)
    assert (status, err) == (0, "")
    assert "vhostmp" in out.partition("example")[2] or "first steps" in out
    usage, sentence = out.split("\n\n")[:2]
    assert usage.startswith("usage: ")
    assert re.fullmatch(r"[A-Z][^\0]*[^ ]\.", sentence), sentence


def test_help_of_show_explains_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Each counter that the tables of `show` have is explained, under the name that it has there."""
    _, out, _ = run("show", "--help", capsys=capsys)
    explained = out.partition("prints")[2]
    own = {"ring", "size", "worker", "pid", "pairs", "cpu"}
    ring = {"index": 0, "started": True, "enabled": True}
    printed = show.render({"devices": [{"queues": [ring]}], "workers": [{}]})
    heads = [line for line in printed.splitlines() if "pid" in line]
    assert len(heads) == 2  # noqa: PLR2004 - of rings and of workers
    titles = {title for line in heads for title in re.split(r"  +", line.strip())} - own
    assert {title for title in titles if not re.search(rf"^.{{8,27}}\b{title}\b", explained, re.M)} == set()


def test_help_is_quick() -> None:
    """The help loads nothing of the control plane but errors: no sockets, no attrs, no compiled part."""
    code = "import sys; from vhostmp import cli; cli.main(['--help']); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert {name for name in loaded if name.startswith("vhostmp")} == {"vhostmp", "vhostmp.cli", "vhostmp.errors"}
    assert not loaded & {"attr", "logging", "socket", "posix_ipc"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is the package's."""
    assert run("--version", capsys=capsys) == (0, f"vhostmp {__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        ["--print-capabilities"],
        ["serve", "--print-capabilities"],
        ["serve", "--print-capabilities", "--socket-path", "/nonexistent/x", "--bogus", "--fd", "x"],
        ["--print-capabilities", "bogus"],
    ],
)
def test_capabilities(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """Capabilities are one JSON object, whatever else is on the command line."""
    status, out, err = run(*words, capsys=capsys)
    assert (status, json.loads(out), err) == (0, {"type": "net"}, "")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["serve", "--device", "blk", "--print-capabilities"], "block"),
        (["--print-capabilities", "--device=rng"], "rng"),
        (["--blk-file=/x", "--print-capabilities"], "block"),
        (["--print-capabilities", "--device", "python:x:Y"], "net"),
        (["--print-capabilities", "--device"], "net"),
    ],
)
def test_capabilities_by_class(capsys: pytest.CaptureFixture[str], words: list[str], kind: str) -> None:
    """The type is that of the class of device; a disk's program says which options it has of those that QEMU names."""
    status, out, err = run(*words, capsys=capsys)
    printed = json.loads(out)
    assert (status, printed["type"], err) == (0, kind, "")
    assert printed.get("features") == (["read-only", "blk-file"] if kind == "block" else None)


MISTAKES: list[tuple[list[str], str]] = [
    ([], "no command given; see 'vhostmp --help'"),
    (["bogus"], "invalid choice: 'bogus'"),
    (["serve"], "nothing to serve: give --socket-path PATH or --fd N"),
    (["--bogus"], "unrecognized arguments: --bogus; see 'vhostmp --help'"),
    (["serve", "--bogus"], "unrecognized arguments: --bogus; see 'vhostmp serve --help'"),
    (["workers", "--control-path", "x", "new", "--bogus"], "--bogus; see 'vhostmp workers --help'"),
    (["qemu-args", "s", "--qemu", "./none"], "'./none --version' tells no version: give --qemu the QEMU"),
    (["qemu-args", "a b"], "no blank, *, ?, [ or \\ in the path"),
    (["serve", "--fd", "x"], "argument --fd: 'x' is not a number in 0.."),
    (["serve", "--fd", "-1"], "argument --fd: "),
    (["serve", "--socket-path", "s", "--cpus", "a"], "argument --cpus: 'a' is no list of processors: write 2 or 0,2-4"),
    (["serve", "--socket-path", "s", "--cpus", "3-1"], "argument --cpus: '3-1' are no processors"),
    (["serve", "--socket-path", "s", "--cpus", "1-99999"], "argument --cpus: '1-99999' are no processors"),
    (["serve", "--fd", "1048575"], "fd 1048575 is not open: pass a listening or connected socket"),
    (["serve", "--fd", "3", "--fd", "3"], "fd 3 is given twice"),
    (["serve", "--fd", "3", "--ready-fd", "3"], "fd 3 is given twice"),
    (["serve", "--fd", "3", "--socket-path", "s"], "exclude each other"),
    (["serve", "--fd", "3", "--connect"], "--connect goes with --socket-path"),
    (["serve", "--socket-path", "s", "--ready-fd", "1048575"], "ready fd 1048575 is not open"),
    (["serve", "--socket-path", "s", "--workers", "0"], "argument --workers: '0' is not a number in 1..64"),
    (["serve", "--socket-path", "s", "--queue-pairs", "129"], "'129' is not a number in 1..128"),
    (["serve", "--socket-path", "s", "--busy-poll", "-1"], "argument --busy-poll"),
    (["serve", "--socket-path", "s", "--offloads", "maybe"], "invalid choice: 'maybe'"),
    (["serve", "--socket-path", "s", "--socket-path", "./s"], "is given twice: each socket needs its own"),
    (["serve", "--socket-path", "s", "--control-path", "s"], "is given twice"),
    (["serve", "--socket-path", "s", "--backend", "null", "--backend", "null"], "sockets: 1, back-ends: 2: give one"),
    (["serve", "--socket-path", "s", "--mac", "02:xx"], "argument --mac: '02:xx' is no Ethernet address: write it as"),
    (["serve", "--socket-path", "s", "--mac", "02:100"], "'02:100' is no Ethernet address"),
    (["serve", "--socket-path", "s", *["--mac", "2:0:0:0:0:1"] * 2], "sockets: 1, addresses: 2: give one"),
    (["serve", "--socket-path", "s", "--mac", "1:0:0:0:0:0"], "01:00:00:00:00:00 is no unicast Ethernet address"),
    (["serve", "--socket-path", "no/such/s"], "no directory no/such for socket no/such/s: create it"),
    (["serve", "--socket-path", "x" * 108], "has 108 bytes and a UNIX socket takes 107: choose a shorter one"),
    (["serve", "--socket-path", ""], "the socket path is empty"),
    (["serve", "--socket-path", "s", "--device", "gpu"], "'gpu' is none of net, blk, rng, python:MODULE:CLASS"),
    (["serve", "--socket-path", "s", "--device", "blk"], "a disk needs an image: give --backend file:PATH"),
    (["serve", "--socket-path", "s", "--device", "rng", "--queue-pairs", "1"], "--queue-pairs goes with --device net"),
    (["serve", "--socket-path", "s", "--device", "rng", "--offloads", "on"], "--offloads goes with --device net"),
    (["serve", "--socket-path", "s", "--queues", "2"], "--queues goes with --device blk"),
    (["serve", "--socket-path", "s", "--read-only"], "--read-only goes with --blk-file"),
    (["serve", "--socket-path", "s", "--blk-file", "x", "--device", "rng"], "--blk-file stands for --device blk"),
    (["serve", "--socket-path", "s", "--blk-file", "none"], "file:none: no file none: make one"),
    (["serve", "--socket-path", "s", "--device", "rng", "--mac", "02:0:0:0:0:1"], "--mac goes with --device net"),
    (["serve", "--socket-path", "s", "--device", "python:x:Y", "--backend", "null"], "a class of your own is its own"),
    (["serve", "--socket-path", "s", "--device", "python:none.py:Y"], "none.py does not exist"),
    (["serve", "--socket-path", "s", "--device", "rng", "--backend", "tap:x"], "no source of random bytes 'tap:x'"),
    (["show"], "the following arguments are required: --control-path"),
    (["show", "--control-path", "none"], "cannot connect to socket none: there is no such socket: start the program"),
    (["workers"], "the following arguments are required: --control-path"),
    (["workers", "--control-path", "none"], "there is no such socket"),
    (["workers", "--control-path", "none", "more"], "invalid choice: 'more'"),
    (["workers", "--control-path", "none", "free"], "the following arguments are required: ID"),
    (["workers", "--control-path", "none", "free", "-1"], "argument ID: '-1' is not a whole number"),
    (["workers", "--control-path", "none", "attach", "0", "x"], "argument ID: 'x' is not a whole number"),
    (["swap", "--control-path", "none"], "the following arguments are required: SPEC"),
    (["swap", "--control-path", "none", "null"], "there is no such socket"),
    (["--fd", "1048575"], "fd 1048575 is not open"),
    (["--socket-path=no/such/s"], "no directory no/such"),
]


@pytest.mark.parametrize(("words", "text"), MISTAKES, ids=[" ".join(words)[:50] for words, _ in MISTAKES])
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake is one line on stderr that says what to do, status 2; no traceback, nothing left behind."""
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*words, capsys=capsys)
    assert (status, out) == (2, "")
    assert len(told(err)) == 1
    assert told(err)[0].startswith("vhostmp: ")
    assert text in err
    assert list(tmp_path.iterdir()) == []


def test_internal_errors_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours is one line and status 1; VHOSTMP_DEBUG=1 shows where it was made."""

    def crash(command: str | None = None) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.delenv("VHOSTMP_DEBUG", raising=False)
    monkeypatch.setattr(cli, "make_parser", crash)
    status, _, err = run("show", capsys=capsys)
    assert status == cli.EXIT_INTERNAL
    assert err.startswith("vhostmp: internal error: ZeroDivisionError('oops'); run again with VHOSTMP_DEBUG=1")
    monkeypatch.setenv("VHOSTMP_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("show", capsys=capsys)


def test_output_into_a_closed_pipe() -> None:
    """A reader that has gone is no error: nothing on stderr."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "vhostmp", "qemu-args", "/tmp/x.sock"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("words", [["qemu-args", "/tmp/x.sock"], ["stress", "--list"]], ids=" ".join)
def test_output_onto_a_full_device(words: list[str]) -> None:
    """Whoever reads our output has no room for it: one line that says so, however much of it there is."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vhostmp", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == cli.EXIT_MISTAKE
    assert told(done.stderr) == ["vhostmp: cannot write standard output: No space left on device"]


def test_ctrl_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at a command that does not serve ends it as a shell expects, without a traceback."""

    def interrupt(command: str | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_parser", interrupt)
    assert run("show", capsys=capsys) == (cli.EXIT_INTERRUPTED, "", "")


def test_interrupt_while_modules_are_loaded() -> None:
    """Ctrl-C before there is a command to interrupt is its end, without a traceback."""
    script = """
import runpy, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "vhostmp.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
runpy.run_module("vhostmp", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (cli.EXIT_INTERRUPTED, "", "")
