"""The loopback and patch back-ends: what a queue pair sends, its partner receives, itself or another device's.

Of a patch the other ring is another guest's (`_patch.pxd`): its own memory, header length, features, format. Loopback
is a device patched to itself.

One copy, from the transmit buffer to the receive buffer, both in guest memory. A guest can make the two overlap, so can
two guests that share memory, and so the copy is memmove. A packet for which there is no receive buffer stays in the
transmit ring until there is one: nothing is lost. A packet that no receive buffer could ever hold is dropped (no_room).

A receive ring that is stopped has no buffers yet, so packets wait in the transmit ring for it too, as they do while
there is no other end; one that is disabled wants no packets: they are taken and dropped (vhost-user, "Ring states"),
and so it is with one that broke, until it is started anew.

The header that the sender wrote is handed on as far as the receiver negotiated to take such packets (offload drop
otherwise), and only what the receiver has to know of it; num_buffers is ours. A sender without CSUM has nothing to ask
for in a header, so its headers count as plain.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

from vhostmp.shm.atomics cimport vmp_load_relaxed_u32, vmp_store_relaxed_u16, vmp_store_relaxed_u32
from vhostmp.shm.build cimport vmp_kill_point
from vhostmp.shm.layout cimport (
    VMP_DROP_DISABLED,
    VMP_DROP_NO_ROOM,
    VMP_DROP_OVERSIZE,
    VMP_DROP_SHORT,
    VMP_KILL_COPIED,
    VMP_KILL_DELIVERED,
)
from vhostmp.workers._fetch cimport fetch_readable, fetch_writable
from vhostmp.workers._journal cimport journal_begin_bursts, journal_effect
from vhostmp.workers._net cimport (
    F_CSUM,
    F_MRG_RXBUF,
    gather,
    has,
    header_check,
    header_hand_on,
    header_is_plain,
    net_offloads,
    put_header,
    receive_offloads,
    spread,
)
from vhostmp.workers._vring cimport (
    BURST,
    READABLE,
    TOUCH,
    WRITABLE,
    burst,
    chain,
    iovec,
    vring_call,
    vring_disable_notify,
    vring_drained,
    vring_fetch,
    vring_give_back,
    vring_has_more,
    vring_publish,
    vring_unfetch,
)
from vhostmp.workers._work cimport (
    BROKEN,
    BUDGET_BYTES,
    BUDGET_PACKETS,
    DONE,
    ETHERNET_HEADER,
    FRAME_MAX,
    MORE,
    WAIT,
    count_copied,
    count_drop,
    count_packets,
    note_source,
    queue_ring,
    worker,
    wring,
)

cdef uint8_t[12] PLAIN_HEADER = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]


cdef void copy_frame(const iovec *out, size_t out_at, const iovec *to, size_t to_at, uint32_t size) noexcept nogil:
    """Copy `size` bytes behind the first `out_at` of segments behind the first `to_at` of others. They may overlap."""
    cdef size_t part
    while out_at >= out.iov_len:
        out_at -= out.iov_len
        out += 1
    while to_at >= to.iov_len:
        to_at -= to.iov_len
        to += 1
    while size:
        part = out.iov_len - out_at
        if part > to.iov_len - to_at:
            part = to.iov_len - to_at
        if part > size:
            part = size
        memmove(<uint8_t *> to.iov_base + to_at, <const uint8_t *> out.iov_base + out_at, part)
        size -= <uint32_t> part
        if size == 0:
            return
        out_at += part
        to_at += part
        while out_at >= out.iov_len:
            out_at -= out.iov_len
            out += 1
        while to_at >= to.iov_len:
            to_at -= to.iov_len
            to += 1


cdef int loopback_transmit(wring *r, worker *w) noexcept nogil:
    """Move packets from the transmit ring to the pair's receive ring."""
    cdef wring *peer = r.partner
    cdef burst *tx = &w.tx
    cdef burst *rx = &w.rx
    cdef uint32_t header_len = r.dev.header_len
    cdef uint32_t peer_header_len = peer.dev.header_len
    cdef bint mergeable = has(peer.dev.features, F_MRG_RXBUF)
    cdef net_offloads offloads = receive_offloads(peer.dev.features)
    cdef bint asks = has(r.dev.features, F_CSUM)    # without it no header may ask for anything: none is looked at
    cdef uint32_t packets = 0
    cdef uint64_t bytes_ = 0
    cdef uint64_t burst_bytes
    cdef uint32_t burst_packets
    cdef uint32_t size, total, taken
    cdef uint64_t room              # of chains whose lengths the guest chose: a sum that must not wrap
    cdef uint8_t[16] header
    cdef chain *c
    cdef const iovec *out
    cdef const iovec *to
    cdef int n, m, i, j
    cdef int reason
    cdef bint starved
    cdef bint drained
    cdef bint widen = False
    cdef uint32_t most
    if not peer.active or peer == r:
        if peer != r and peer.started and (peer.resting or vmp_load_relaxed_u32(&peer.vq.slot.broken)):
            return discard_disabled(r, w)
        vring_disable_notify(&r.vq)         # whatever starts, maps, moves or brings it queues us
        return WAIT
    while packets < BUDGET_PACKETS and bytes_ < BUDGET_BYTES:
        n = vring_fetch(&r.vq, tx, BURST, READABLE | TOUCH)
        if n <= 0:
            return BROKEN if n < 0 else DONE
        # As many receive chains as packets: what is taken and put back costs the driver's cache lines. More where one
        # packet turned out to need them.
        most = BURST if widen else <uint32_t> n
        widen = False
        m = vring_fetch(&peer.vq, rx, most, WRITABLE | TOUCH)
        if m < 0:
            vring_unfetch(&r.vq, tx, <uint32_t> n)
            return MORE             # the loop stops the broken ring; then this one discards
        drained = vring_drained(&peer.vq)
        starved = False
        i = 0
        j = 0
        # What is copied has no effect before the receive ring shows it: the journal does not count it as repeated.
        journal_effect(&r.vq, &peer.vq, peer.number)
        burst_bytes = 0
        burst_packets = 0
        while i < n:
            c = &tx.chains[i]
            size = c.readable
            if size < header_len + ETHERNET_HEADER:
                count_drop(r, VMP_DROP_SHORT, 1)
                i += 1
                continue
            if size > header_len + FRAME_MAX:
                count_drop(r, VMP_DROP_OVERSIZE, 1)
                i += 1
                continue
            out = &tx.segments[c.first]
            if not asks:
                memset(header, 0, 12)
            elif out.iov_len >= 12:
                memcpy(header, out.iov_base, 12)
            else:
                gather(out, c.n_readable, 0, header, header_len)
            if not header_is_plain(header):
                reason = header_check(header, size - header_len, offloads)
                if reason >= 0:
                    count_drop(r, reason, 1)
                    i += 1
                    continue
                header_hand_on(header)
            total = size - header_len + peer_header_len
            # Receive chains for it, in the order in which the driver gave them.
            room = 0
            taken = 0
            while j + <int> taken < m and room < total and (taken == 0 or mergeable):
                room += rx.chains[j + <int> taken].writable
                taken += 1
            if room < total:
                if (taken and not mergeable) or m - j == peer.vq.num or (j == 0 and not drained and most == BURST):
                    count_drop(r, VMP_DROP_NO_ROOM, 1)
                    i += 1
                    continue
                starved = True
                break
            to = &rx.segments[rx.chains[j].first]
            header[10] = <uint8_t> taken
            header[11] = 0
            put_header(to, rx.n_segments - rx.chains[j].first, header, peer_header_len)
            if i + 1 < n:
                fetch_readable(tx, <uint32_t> i + 1)
                fetch_writable(rx, <uint32_t> j + taken, tx.chains[i + 1].readable)
            copy_frame(out, header_len, to, peer_header_len, size - header_len)
            j += <int> spread(rx, <uint32_t> j, total)
            burst_bytes += size - header_len
            burst_packets += 1
            i += 1
        if burst_packets and packets == 0:
            out = &tx.segments[tx.chains[0].first]
            if out.iov_len >= header_len + ETHERNET_HEADER:
                note_source(r, <const uint8_t *> out.iov_base + header_len)
        vring_unfetch(&r.vq, tx, <uint32_t> (n - i))
        vring_unfetch(&peer.vq, rx, <uint32_t> (m - j))
        journal_begin_bursts(&r.vq, burst_packets)
        # Receive first: a worker that dies in between repeats packets on the transmit side, it loses none.
        vmp_kill_point(r.vq.slot, VMP_KILL_COPIED)
        if j:
            vring_give_back(&peer.vq, rx, 0, <uint32_t> j)
            vring_publish(&peer.vq)
            vring_call(&peer.vq)
            count_packets(w, peer, burst_packets, burst_bytes)
            count_copied(peer, burst_bytes)
        vmp_kill_point(r.vq.slot, VMP_KILL_DELIVERED)
        if not i:
            vmp_store_relaxed_u16(&r.vq.slot.effect_valid, 0)   # nothing was begun: not for who serves the ring next
        else:
            vring_give_back(&r.vq, tx, 0, <uint32_t> i)
            vring_publish(&r.vq)
            vring_call(&r.vq)
            count_packets(w, r, burst_packets, burst_bytes)
            packets += <uint32_t> i
            bytes_ += burst_bytes
        widen = starved and j == 0
        if starved and drained:
            # The receive ring has too little: its own work item waits for the driver, and queues us when there is more.
            r.waits_for_output = 1
            queue_ring(w, peer)
            return WAIT
    return MORE


cdef int discard_disabled(wring *r, worker *w) noexcept nogil:
    """The receive ring is not enabled: take packets off the transmit ring and drop them."""
    cdef int n = vring_fetch(&r.vq, &w.tx, BURST, READABLE | TOUCH)
    if n <= 0:
        return BROKEN if n < 0 else DONE
    vring_give_back(&r.vq, &w.tx, 0, <uint32_t> n)
    vring_publish(&r.vq)
    vring_call(&r.vq)
    count_drop(r, VMP_DROP_DISABLED, <uint64_t> n)
    w.moved += <uint32_t> n
    return MORE


cdef int loopback_receive(wring *r, worker *w) noexcept nogil:
    """The driver made receive buffers available, or the transmit ring waits for some."""
    cdef wring *peer = r.partner
    vmp_store_relaxed_u32(&r.vq.slot.waiting, 0)    # what a back-end before this one held was dropped with it
    if not peer.waits_for_output:
        vring_disable_notify(&r.vq)
        return WAIT
    if r.stalled:
        return WAIT         # for the IOTLB; what ends that queues both
    if not vring_has_more(&r.vq):
        return DONE
    peer.waits_for_output = 0
    queue_ring(w, peer)
    return WAIT
