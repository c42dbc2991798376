"""Which message is legal when: every phase against every message."""

from __future__ import annotations

import copy
import itertools

import pytest

from vhostmp.consts import ProtocolFeature, Request
from vhostmp.protocol.codec import BadMessage, Message
from vhostmp.protocol.messages import MESSAGES
from vhostmp.protocol.payloads import Empty
from vhostmp.protocol.state import LEGAL, TRANSITIONS, Event, Phase, SessionState

ALL = (1 << 23) - 1

BEFORE_OWNER = {
    Request.SET_OWNER,
    Request.GET_FEATURES,
    Request.GET_PROTOCOL_FEATURES,
    Request.SET_PROTOCOL_FEATURES,
    Request.GET_QUEUE_NUM,
    Request.GET_MAX_MEM_SLOTS,
    Request.SET_BACKEND_REQ_FD,
    Request.SET_VRING_ENABLE,
    Request.GET_VRING_BASE,
}


def legal(state: SessionState, request: Request) -> bool:
    """Whether a message passes, checking that the judgement changes nothing."""
    before = copy.copy(state)
    refusal: BadMessage | None = None
    try:
        state.check(Message(request, Empty()))
    except BadMessage as bad:
        refusal = bad
    assert state == before
    assert refusal is None or (refusal.request, refusal.field) == (request, "request")
    return refusal is None


def test_before_the_owner() -> None:
    """Before SET_OWNER only questions, protocol features, the owner and what takes its place are legal."""
    state = SessionState(ALL, negotiated=ALL)
    assert {request for request in MESSAGES if legal(state, request)} == BEFORE_OWNER


def test_while_stopped_and_while_running() -> None:
    """With an owner all but a second SET_OWNER is legal, and protocol features cannot change while a ring runs."""
    state = SessionState(ALL, Phase.OWNED, ALL)
    assert {request for request in MESSAGES if not legal(state, request)} == {Request.SET_OWNER}
    state.advance(Event.RING_STARTED)
    assert {request for request in MESSAGES if not legal(state, request)} == {
        Request.SET_OWNER,
        Request.SET_PROTOCOL_FEATURES,
    }


def test_after_the_end() -> None:
    """Nothing is legal on a closed connection."""
    state = SessionState(ALL, Phase.RUNNING, ALL)
    state.advance(Event.CLOSED)
    assert not any(legal(state, request) for request in MESSAGES)


@pytest.mark.parametrize(
    ("request_", "feature"),
    [
        (Request.SEND_RARP, ProtocolFeature.RARP),
        (Request.NET_SET_MTU, ProtocolFeature.NET_MTU),
        (Request.SET_BACKEND_REQ_FD, ProtocolFeature.BACKEND_REQ),
        (Request.SET_STATUS, ProtocolFeature.STATUS),
        (Request.GET_STATUS, ProtocolFeature.STATUS),
        (Request.VRING_KICK, ProtocolFeature.INBAND_NOTIFICATIONS),
        (Request.SET_DEVICE_STATE_FD, ProtocolFeature.DEVICE_STATE),
        (Request.CHECK_DEVICE_STATE, ProtocolFeature.DEVICE_STATE),
        (Request.GET_INFLIGHT_FD, ProtocolFeature.INFLIGHT_SHMFD),
        (Request.SET_INFLIGHT_FD, ProtocolFeature.INFLIGHT_SHMFD),
        (Request.IOTLB_MSG, ProtocolFeature.BACKEND_REQ),
        (Request.GET_CONFIG, ProtocolFeature.CONFIG),
        (Request.SET_CONFIG, ProtocolFeature.CONFIG),
        (Request.RESET_DEVICE, ProtocolFeature.RESET_DEVICE),
        (Request.ADD_MEM_REG, ProtocolFeature.CONFIGURE_MEM_SLOTS),
        (Request.REM_MEM_REG, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    ],
)
def test_messages_of_a_protocol_feature(request_: Request, feature: ProtocolFeature) -> None:
    """A message that belongs to a protocol feature is legal only once exactly that is negotiated."""
    assert legal(SessionState(ALL, Phase.OWNED, feature.mask), request_)
    assert not legal(SessionState(ALL, Phase.OWNED, ALL & ~feature.mask), request_)


@pytest.mark.parametrize(
    ("request_", "feature"),
    [
        (Request.GET_QUEUE_NUM, ProtocolFeature.MQ),
        (Request.GET_MAX_MEM_SLOTS, ProtocolFeature.CONFIGURE_MEM_SLOTS),
    ],
)
def test_questions_of_a_protocol_feature(request_: Request, feature: ProtocolFeature) -> None:
    """A question that belongs to a protocol feature may be asked as soon as that is offered."""
    assert legal(SessionState(feature.mask), request_)
    assert not legal(SessionState(ALL & ~feature.mask), request_)


def test_transitions_are_complete() -> None:
    """Every phase can be closed, can be reached, and has its set of legal messages; no transition is left undefined."""
    assert set(TRANSITIONS) == set(LEGAL) == set(Phase)
    assert all(targets[Event.CLOSED] is Phase.CLOSED for targets in TRANSITIONS.values())
    reached = {Phase.UNOWNED} | set(itertools.chain.from_iterable(targets.values() for targets in TRANSITIONS.values()))
    assert reached == set(Phase)
    for phase, event in itertools.product(Phase, Event):
        state = SessionState(ALL, phase)
        if event in TRANSITIONS[phase]:
            state.advance(event)
            assert state.phase is TRANSITIONS[phase][event]
        else:
            with pytest.raises(KeyError):
                state.advance(event)
            assert state.phase is phase


@pytest.mark.parametrize(("features", "waits"), [(None, False), (0, False), (1 << 32, False), (1 << 30, True)])
def test_who_enables_rings(features: int | None, waits: bool) -> None:
    """Rings wait to be enabled exactly if bit 30 (as a bit, not as the number 30) was acked."""
    assert SessionState(ALL, features=features).rings_wait_for_enable is waits
