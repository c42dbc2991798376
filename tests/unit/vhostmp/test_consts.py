"""Numbers and names."""

from __future__ import annotations

import pytest

from vhostmp import consts


def test_features_are_named_lowest_first() -> None:
    """Set bits come out as the specification's names in ascending order, a bit without a name by its number."""
    bits = 1 << 58 | 1 << 32 | 1 << 30 | 1 << 26 | 1 << 15 | 1
    assert consts.feature_names(bits) == ["CSUM", "MRG_RXBUF", "LOG_ALL", "PROTOCOL_FEATURES", "VERSION_1", "BIT_58"]
    assert consts.feature_names(0) == []


@pytest.mark.parametrize(("device_class", "own"), [("net", "VIRTIO_NET_F_"), ("blk", "VIRTIO_BLK_F_")])
def test_no_two_features_share_a_bit(device_class: str, own: str) -> None:
    """Every feature constant of a class of device has its own entry in the class's table of names."""
    prefixes = ("VIRTIO_F_", own, "VHOST_F_", "VHOST_USER_F_")
    constants = [name for name in vars(consts) if name.startswith(prefixes)]
    assert len(constants) == len(consts.FEATURE_NAMES[device_class])
    assert len(set(consts.FEATURE_NAMES[device_class].values())) == len(constants)


def test_features_are_named_by_class() -> None:
    """A bit of a device's own has the name that its class gives it; a class without a table has the common names."""
    bits = consts.mask([9, consts.VIRTIO_F_VERSION_1])
    assert consts.feature_names(bits) == ["GUEST_ECN", "VERSION_1"]
    assert consts.feature_names(bits, "blk") == ["FLUSH", "VERSION_1"]
    assert consts.feature_names(bits, "rng") == ["BIT_9", "VERSION_1"]


def test_protocol_features_are_named() -> None:
    """Protocol features come out by name, unknown ones by number."""
    assert consts.protocol_feature_names(1 << 3 | 1 | 1 << 40) == ["MQ", "REPLY_ACK", "BIT_40"]


@pytest.mark.parametrize(("number", "name"), [(5, "SET_MEM_TABLE"), (44, "GET_SHMEM_CONFIG"), (45, "request 45")])
def test_requests_are_named(number: int, name: str) -> None:
    """A request is called by its name, or by its number where it has none."""
    assert consts.request_name(number) == name


def test_requests_are_complete() -> None:
    """The requests are 1 to 44 without a gap, as in the document."""
    assert [request.value for request in consts.Request] == list(range(1, 45))


def test_mask_sets_exactly_the_bits() -> None:
    """A mask is the sum of its bits, each counted once."""
    assert consts.mask([0, 3, 3, 40]) == 1 | 8 | 1 << 40
