"""What the peer tests need: the peers themselves, or a reason to skip.

A test whose peer is missing is skipped and says what is missing; with VHOSTMP_PEERS=require in the environment that
skip is a failure, so that a machine that is meant to have the peers cannot pass without them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.peers import guest, image, testpmd
from tests.peers.booted import Start
from tests.peers.network import Network

TESTPMDS_AT_A_TIME = 2


def _required() -> bool:
    """Whether a missing peer is a failure."""
    return os.environ.get("VHOSTMP_PEERS") == "require"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where the peers are required."""
    report = yield
    if report.skipped and _required() and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: VHOSTMP_PEERS=require, and yet: {reason}"
    return report


def _need(*programs: str) -> None:
    """Skip unless the programs are there and we may make namespaces."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces, taps and huge pages")
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"no {name} (make peers)")
    probe = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no namespaces: {probe.stderr.strip()}")


@pytest.fixture(scope="session")
def guest_image(tmp_path_factory: pytest.TempPathFactory) -> image.Image:
    """Return the Linux guest's kernel and file system, built once."""
    _need("setpriv", "nsenter", guest.PROGRAM)
    reason = image.missing()
    if reason:
        pytest.skip(reason)
    return image.build(tmp_path_factory.mktemp("image"))


@pytest.fixture
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Network]:
    """Yield the test's own network; its tap is multi-queue when the fixture's parameter says so."""
    _need("setpriv", "nsenter", "ip", "ping")
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun")
    with Network(tmp_path, multi_queue=bool(getattr(request, "param", False))) as made:
        yield made


@pytest.fixture
def start(guest_image: image.Image, network: Network, tmp_path: Path) -> Iterator[Start]:
    """Yield what starts a back-end and a guest on it, both ended after the test."""
    with ExitStack() as stack:
        yield Start(stack, guest_image, network, tmp_path)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testpmd.HugePages]:
    """Yield huge pages for DPDK."""
    _need("setpriv", "nsenter", "stdbuf", testpmd.PROGRAM)
    try:
        made = testpmd.HugePages(tmp_path_factory.mktemp("dpdk") / "pages", TESTPMDS_AT_A_TIME)
    except testpmd.NotEnoughMemoryError as error:
        pytest.skip(str(error))
    with made:
        yield made
