"""The QEMU options: right for the version found, and helpful when no QEMU is found."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from vhostmp import qemu
from vhostmp.errors import LocalError
from vhostmp.qemu import Card, Version

DEBIAN_12 = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022 Fabrice Bellard\n"
DEBIAN_13 = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright (c) 2003-2025 Fabrice Bellard\n"


def value(words: Sequence[str], option: str) -> str:
    """Return the value that follows `option`, which must stand there once."""
    assert words.count(option) == 1, words
    return words[words.index(option) + 1]


def parse(*argv: str) -> argparse.Namespace:
    """Parse `argv` as ``vhostmp qemu-args`` would."""
    parser = argparse.ArgumentParser(prog="vhostmp qemu-args")
    qemu.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (DEBIAN_12, Version(7, 2)),
        (DEBIAN_13, Version(10, 0)),
        ("QEMU emulator version 9.2.0\n", Version(9, 2)),
        ("QEMU emulator version 9.1.93 (v9.2.0-rc3)", Version(9, 1)),
        ("", None),
        ("qemu: unknown option\n", None),
    ],
)
def test_version_is_found_in_what_qemu_prints(text: str, version: Version | None) -> None:
    """The version is the first one printed; None when there is none."""
    assert qemu.parse_version(text) == version


@pytest.mark.parametrize(
    ("version", "reconnect"),
    [
        (Version(7, 2), "reconnect=1"),
        (Version(9, 1), "reconnect=1"),
        (Version(9, 2), "reconnect-ms=1000"),
        (Version(10, 0), "reconnect-ms=1000"),
        (None, "reconnect-ms=1000"),
    ],
)
def test_reconnect_is_spelled_as_the_version_wants(version: Version | None, reconnect: str) -> None:
    """Before 9.2 the option counts seconds under its old name, from 9.2 milliseconds; unknown is taken as new."""
    chardev = value(qemu.options(Card(path="/run/s"), version), "-chardev")
    assert [part for part in chardev.split(",") if part.startswith("reconnect")] == [reconnect]


def test_memory_is_shared_and_is_the_machines() -> None:
    """Worker processes map guest memory, so it must be a shared memfd, as large as -m says and used by the machine."""
    words = qemu.options(Card(path="/run/s", memory="512M"))
    memory = value(words, "-object").split(",")
    assert memory[0] == "memory-backend-memfd"
    assert {"share=on", "size=512M"} <= set(memory)
    (name,) = (part.removeprefix("id=") for part in memory if part.startswith("id="))
    assert f"memory-backend={name}" in value(words, "-machine").split(",")
    assert value(words, "-m") == "512M"


def test_one_queue_pair_asks_for_no_multi_queue() -> None:
    """With one pair neither the netdev nor the card speaks of queues."""
    words = qemu.options(Card(path="/run/s"))
    assert "queues" not in value(words, "-netdev")
    assert "mq" not in value(words, "-device")
    assert "vectors" not in value(words, "-device")


def test_queue_pairs_have_a_vector_for_each_ring() -> None:
    """N pairs need 2 N ring vectors, one for the control queue and one for configuration changes."""
    words = qemu.options(Card(path="/run/s", queue_pairs=3))
    assert "queues=3" in value(words, "-netdev").split(",")
    assert {"mq=on", "vectors=8"} <= set(value(words, "-device").split(","))


def test_card_without_msix_has_no_vectors() -> None:
    """For a QEMU without KVM the card gets no MSI-X vectors, with one queue pair or more."""
    assert value(qemu.options(Card(path="/run/s", msix=False)), "-device").split(",")[2:] == ["vectors=0"]
    several = qemu.options(Card(path="/run/s", msix=False, queue_pairs=2))
    assert value(several, "-device").split(",")[2:] == ["mq=on", "vectors=0"]


def test_iommu_hears_what_the_guest_takes_back() -> None:
    """The IOMMU comes before the card, which is behind a port of PCI Express: else it would have no ATS."""
    words = qemu.options(Card(path="/run/s", iommu=True, msix=False))
    devices = [word for option, word in zip(words[::2], words[1::2], strict=True) if option == "-device"]
    assert devices == [
        "intel-iommu,device-iotlb=on",
        "pcie-root-port,id=vhostmp-port0",
        "virtio-net-pci,netdev=vhostmp-net0,vectors=0,bus=vhostmp-port0,iommu_platform=on,ats=on,disable-legacy=on",
    ]
    with pytest.raises(LocalError, match="not with blk"):
        Card(path="/s", device="blk", iommu=True)


@pytest.mark.parametrize(
    ("card", "device"),
    [
        (Card(path="/s", device="blk"), "vhost-user-blk-pci,chardev=vhostmp-char0,num-queues=1"),
        (
            Card(path="/s", device="blk", queues=4, msix=False),
            "vhost-user-blk-pci,chardev=vhostmp-char0,num-queues=4,vectors=0",
        ),
        (Card(path="/s", device="rng"), "vhost-user-rng-pci,chardev=vhostmp-char0"),
        (Card(path="/s", device="rng", msix=False), "vhost-user-rng-pci,chardev=vhostmp-char0,vectors=0"),
    ],
)
def test_other_devices_have_no_netdev(card: Card, device: str) -> None:
    """A disk and a source of random numbers are one device; QEMU cannot reconnect to the latter."""
    words = qemu.options(card, Version(7, 2))
    assert "-netdev" not in words
    assert value(words, "-device") == device
    assert ("reconnect=1" in value(words, "-chardev")) == (card.device != "rng")


def test_unknown_class_of_device_is_refused() -> None:
    """A class that QEMU has no device for, or as many queues as none has, is a mistake of the user's."""
    with pytest.raises(LocalError, match="choose one of net blk rng"):
        Card(path="/s", device="gpu")
    with pytest.raises(LocalError, match="such as vhost-user-i2c-pci"):
        Card(path="/s", device="python:x:Y")
    with pytest.raises(LocalError, match="0 queues"):
        Card(path="/s", device="blk", queues=0)


def test_ids_tie_chardev_netdev_and_card_together() -> None:
    """The card uses the netdev and the netdev uses the character device of the same command line."""
    words = qemu.options(Card(path="/run/s"))
    chardev = next(part for part in value(words, "-chardev").split(",") if part.startswith("id=")).removeprefix("id=")
    netdev = next(part for part in value(words, "-netdev").split(",") if part.startswith("id=")).removeprefix("id=")
    assert f"chardev={chardev}" in value(words, "-netdev").split(",")
    assert f"netdev={netdev}" in value(words, "-device").split(",")


def test_connect_makes_qemu_the_server() -> None:
    """When the back-end connects, QEMU listens and has nobody to reconnect to."""
    chardev = value(qemu.options(Card(path="/run/s", connect=True), Version(7, 2)), "-chardev").split(",")
    assert {"server=on", "wait=off"} <= set(chardev)
    assert not [part for part in chardev if part.startswith("reconnect")]


def test_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU may be started in another directory than vhostmp."""
    monkeypatch.chdir(tmp_path)
    assert f"path={tmp_path}/s.sock" in value(qemu.options(Card(path="s.sock")), "-chardev").split(",")


def test_comma_in_the_path_is_doubled() -> None:
    """QEMU ends a value at a comma unless it is doubled."""
    assert ",path=/run/a,,b," in value(qemu.options(Card(path="/run/a,b")), "-chardev")


@pytest.mark.parametrize(
    ("path", "queue_pairs", "memory", "message"),
    [
        ("/run/s", 0, "1G", "0 queue pairs"),
        ("/run/s", 129, "1G", "129 queue pairs"),
        ("/run/s", 1, "1024", "memory '1024'"),
        ("/run/s", 1, "0G", "memory '0G'"),
        ("/run/s", 1, "1G,share=off", "memory '1G,share=off'"),
        ("/" + "s" * 107, 1, "1G", "108 bytes"),
    ],
)
def test_values_out_of_range_are_refused(path: str, queue_pairs: int, memory: str, message: str) -> None:
    """A value QEMU or the socket could not take is named in the error."""
    with pytest.raises(LocalError, match=message):
        Card(path=path, queue_pairs=queue_pairs, memory=memory)


def test_longest_socket_path_is_taken() -> None:
    """107 bytes and the ending zero fill sun_path exactly."""
    assert qemu.options(Card(path="/" + "s" * 106))


def test_probe_asks_the_program_for_its_version() -> None:
    """The probe runs the program with --version alone."""
    asked: list[Sequence[str]] = []

    def runner(command: Sequence[str]) -> str:
        asked.append(command)
        return DEBIAN_12

    assert qemu.probe_version("qemu-kvm", runner) == Version(7, 2)
    assert asked == [["qemu-kvm", "--version"]]


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(2, "no such file"), subprocess.CalledProcessError(1, "q"), subprocess.TimeoutExpired("q", 1)],
)
def test_probe_of_a_qemu_that_does_not_answer_is_none(error: Exception) -> None:
    """A QEMU that is missing, fails or hangs has no version; that is no error."""

    def runner(_command: Sequence[str]) -> str:
        raise error

    assert qemu.probe_version("qemu", runner) is None


def test_run_program_returns_the_output_and_raises_on_failure(tmp_path: Path) -> None:
    """The real runner returns standard output; a missing program and one that fails are different errors."""
    assert qemu.run_program(["echo", "QEMU emulator version 1.2.3"]) == "QEMU emulator version 1.2.3\n"
    with pytest.raises(FileNotFoundError):
        qemu.run_program([str(tmp_path / "missing")])
    with pytest.raises(subprocess.CalledProcessError):
        qemu.run_program(["false"])


def test_run_prints_one_option_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is the options of the version found, and nothing else is printed."""
    assert (
        qemu.run(
            parse("/run/s", "--queue-pairs", "2", "--memory", "256M", "--no-msix", "--iommu"),
            lambda _command: DEBIAN_12,
        )
        == 0
    )
    printed = capsys.readouterr()
    words = qemu.options(Card(path="/run/s", queue_pairs=2, memory="256M", msix=False, iommu=True), Version(7, 2))
    assert printed.out.split() == words
    assert len(printed.out.splitlines()) == len(words) // 2
    assert not printed.err


def test_run_says_when_no_qemu_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a QEMU the options of the newest are printed, and a remark on standard error says so."""

    def runner(_command: Sequence[str]) -> str:
        raise FileNotFoundError

    assert qemu.run(parse("/run/s"), runner) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == qemu.options(Card(path="/run/s"))
    assert len(printed.err.splitlines()) == 1
    assert "qemu-system-x86_64" in printed.err
    assert "9.2" in printed.err


@pytest.mark.parametrize("program", ["missing", "/bin/true"])
def test_a_qemu_that_is_named_must_answer(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that is given by name and tells no version is a mistake; no options are printed for some other QEMU."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LocalError, match=f"'{program} --version' tells no version: give --qemu"):
        qemu.run(parse("/run/s", "--qemu", program))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", ["/run/my sockets/s", "/run/a\tb", "/run/*", "/run/s?", "/run/[s]", "/run/a\\b"])
def test_path_that_the_shell_would_take_apart_is_refused(path: str) -> None:
    """In $(...) the shell splits at blanks and expands patterns, whatever quotes were printed: the path has neither."""
    with pytest.raises(LocalError, match="the shell would take"):
        Card(path=path)


def test_words_come_through_the_shell_as_they_are(tmp_path: Path) -> None:
    """What $(...) makes of the output are the words themselves, whatever else is in the path."""
    words = qemu.options(Card(path="/run/it's,(a)~#$&;é"))
    (tmp_path / "printed").write_text(qemu.format_options(words))
    command = ["sh", "-c", 'printf "%s\\n" $(cat printed)']
    seen = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert seen.splitlines() == words


def ids(words: Sequence[str]) -> list[str]:
    """Return the ids that options give."""
    return [part.removeprefix("id=") for word in words for part in word.split(",") if part.startswith("id=")]


def test_devices_of_one_virtual_machine_go_together() -> None:
    """Those after the first bring neither memory nor machine nor IOMMU, and no id that another one has."""
    first, *others = (
        qemu.options(Card(path=f"/run/s{index}", device=device, iommu=device == "net", index=index))
        for index, device in enumerate(["net", "net", "blk", "rng", "net"])
    )
    words = [*first, *(word for other in others for word in other)]
    for option in ("-m", "-object", "-machine"):
        assert words.count(option) == 1
    assert words.count("intel-iommu,device-iotlb=on") == 1
    assert len(ids(words)) == len(set(ids(words)))
    chassis = [word.partition("chassis=")[2] for word in words if word.startswith("pcie-root-port")]
    assert len(chassis) == len(set(chassis))
    for other in others:
        used = next(part for word in other for part in word.split(",") if part.startswith("chardev="))
        assert used.removeprefix("chardev=") in ids(other)


def test_only_the_first_device_brings_memory() -> None:
    """Memory for one that brings none would be ignored, and no index comes before the first."""
    with pytest.raises(LocalError, match="--memory goes with the first device, not with --index 1"):
        qemu.run(parse("/run/s", "--index", "1", "--memory", "2G"), lambda _command: DEBIAN_12)
    with pytest.raises(LocalError, match="index -1 is not 0, for the first device, or more"):
        Card(path="/s", index=-1)
