"""virtio_net_hdr: the check that each one from a guest passes before it is acted on, and gathering one from a chain.

Layout (virtio 1.3, 5.1.6; little-endian): flags u8, gso_type u8, hdr_len u16, gso_size u16, csum_start u16,
csum_offset u16, and num_buffers u16 when the header has 12 bytes.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove, memset

from vhostmp.shm.build cimport VMP_CHECKS
from vhostmp.shm.layout cimport VMP_DROP_HEADER, VMP_DROP_OFFLOAD
from vhostmp.workers._vring cimport burst, chain, iovec


cdef enum:
    HDR_F_NEEDS_CSUM = 1
    GSO_NONE = 0
    GSO_TCPV4 = 1
    GSO_UDP = 3
    GSO_TCPV6 = 4
    GSO_UDP_L4 = 5
    GSO_ECN = 0x80

    # Feature bits (virtio 1.3, 5.1.3): what the guest may ask us to do, and what we may ask of it.
    F_CSUM = 0
    F_GUEST_CSUM = 1
    F_GUEST_TSO4 = 7
    F_GUEST_TSO6 = 8
    F_GUEST_ECN = 9
    F_GUEST_UFO = 10
    F_HOST_TSO4 = 11
    F_HOST_TSO6 = 12
    F_HOST_ECN = 13
    F_HOST_UFO = 14
    F_MRG_RXBUF = 15
    F_GUEST_USO4 = 54
    F_GUEST_USO6 = 55
    F_HOST_USO = 56


cdef struct net_offloads:
    # One side's feature bits, as masks over the header's fields.
    bint csum
    bint tso4
    bint tso6
    bint ecn
    bint ufo
    bint uso


cdef inline bint has(uint64_t features, int bit) noexcept nogil:
    """Whether a feature bit is set."""
    return features >> bit & 1


cdef inline net_offloads transmit_offloads(uint64_t features) noexcept nogil:
    """What the guest may ask for in what it sends."""
    cdef net_offloads o
    o.csum = has(features, F_CSUM)
    o.tso4 = has(features, F_HOST_TSO4)
    o.tso6 = has(features, F_HOST_TSO6)
    o.ecn = has(features, F_HOST_ECN)
    o.ufo = has(features, F_HOST_UFO)
    o.uso = has(features, F_HOST_USO)
    return o


cdef inline net_offloads receive_offloads(uint64_t features) noexcept nogil:
    """What the guest accepts in what it receives."""
    cdef net_offloads o
    o.csum = has(features, F_GUEST_CSUM)
    o.tso4 = has(features, F_GUEST_TSO4)
    o.tso6 = has(features, F_GUEST_TSO6)
    o.ecn = has(features, F_GUEST_ECN)
    o.ufo = has(features, F_GUEST_UFO)
    o.uso = has(features, F_GUEST_USO4) and has(features, F_GUEST_USO6)
    return o


cdef inline bint header_is_plain(const uint8_t *header) noexcept nogil:
    """Whether a header (our copy) asks for nothing: flags, gso_type, hdr_len, gso_size and csum_start are 0."""
    cdef uint64_t first
    memcpy(&first, header, 8)
    return first == 0


cdef inline int header_check(const uint8_t *header, uint32_t frame_len, net_offloads allowed) noexcept nogil:
    """Check a header (our copy) against its frame of `frame_len` bytes. -1 when good, else a DROP_ reason.

    Source: virtio 1.3, 5.1.6.2 and 5.1.6.2.2; CVE-2024-43817, CVE-2024-11614 for what happens without.
    """
    cdef uint16_t hdr_len, gso_size, csum_start, csum_offset
    cdef uint8_t gso = header[1] & ~GSO_ECN
    if not VMP_CHECKS or header_is_plain(header):
        return -1
    memcpy(&hdr_len, header + 2, 2)
    memcpy(&gso_size, header + 4, 2)
    memcpy(&csum_start, header + 6, 2)
    memcpy(&csum_offset, header + 8, 2)
    if header[0] & HDR_F_NEEDS_CSUM:
        if <uint32_t> csum_start + csum_offset + 2 > frame_len:
            return VMP_DROP_HEADER
        if not allowed.csum:
            return VMP_DROP_OFFLOAD
    if gso == GSO_NONE:
        return VMP_DROP_HEADER if header[1] else -1
    if gso_size == 0 or hdr_len > frame_len or not header[0] & HDR_F_NEEDS_CSUM:
        return VMP_DROP_HEADER
    if header[1] & GSO_ECN and not allowed.ecn:
        return VMP_DROP_OFFLOAD
    if gso == GSO_TCPV4:
        return -1 if allowed.tso4 else VMP_DROP_OFFLOAD
    if gso == GSO_TCPV6:
        return -1 if allowed.tso6 else VMP_DROP_OFFLOAD
    if gso == GSO_UDP:
        return -1 if allowed.ufo else VMP_DROP_OFFLOAD
    if gso == GSO_UDP_L4:
        return -1 if allowed.uso else VMP_DROP_OFFLOAD
    return VMP_DROP_HEADER


cdef inline void header_hand_on(uint8_t *header) noexcept nogil:
    """Leave of a header that passed its check what a receiver has to know: nobody vouches for anything else in it.

    DATA_VALID, say, is a device's to set, not a sender's (virtio 1.3, 5.1.6.2.1 and 5.1.6.4).
    """
    if not header[0] & HDR_F_NEEDS_CSUM:
        memset(header, 0, 10)
        return
    header[0] = HDR_F_NEEDS_CSUM
    if header[1] == GSO_NONE:
        memset(header + 2, 0, 4)


cdef inline void complete_checksum(uint8_t *frame, uint32_t size, uint32_t start, uint32_t offset) noexcept nogil:
    """Fill in the checksum that a header with NEEDS_CSUM left to do: from `start` to the end, stored at start + offset.

    The caller has made sure that the two bytes lie inside the frame (header_check). Source: RFC 1071.
    """
    cdef uint64_t total = 0
    cdef uint32_t i = start
    cdef uint16_t word
    cdef uint16_t result
    while i + 1 < size:
        memcpy(&word, frame + i, 2)
        total += word
        i += 2
    if i < size:
        total += frame[i]
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    result = <uint16_t> ~total
    if result == 0:
        result = 0xFFFF     # 0 means "no checksum" in UDP, and is the same number in TCP
    memcpy(frame + start + offset, &result, 2)


cdef inline void gather(const iovec *segments, uint32_t n, uint32_t skip, uint8_t *to, uint32_t size) noexcept nogil:
    """Copy `size` bytes, after the first `skip`, out of segments that together hold that many."""
    cdef uint32_t i = 0
    cdef size_t part
    while size and i < n:
        if skip >= segments[i].iov_len:
            skip -= <uint32_t> segments[i].iov_len
        else:
            part = segments[i].iov_len - skip
            if part > size:
                part = size
            memcpy(to, <const uint8_t *> segments[i].iov_base + skip, part)
            to += part
            size -= <uint32_t> part
            skip = 0
        i += 1


cdef inline void scatter(
    const iovec *segments, uint32_t n, uint32_t skip, const uint8_t *data, uint32_t size
) noexcept nogil:
    """Copy `size` bytes into segments after their first `skip`; together they have the room."""
    cdef uint32_t i = 0
    cdef size_t part
    while size and i < n:
        if skip >= segments[i].iov_len:
            skip -= <uint32_t> segments[i].iov_len
        else:
            part = segments[i].iov_len - skip
            if part > size:
                part = size
            memcpy(<uint8_t *> segments[i].iov_base + skip, data, part)
            data += part
            size -= <uint32_t> part
            skip = 0
        i += 1


cdef inline void put_header(const iovec *to, uint32_t n, const uint8_t *header, uint32_t header_len) noexcept nogil:
    """Write a header to the start of a chain's segments, unless it stands there.

    Writing makes the line dirty for the guest: only where it differs.
    """
    if to.iov_len < 12:
        scatter(to, n, 0, header, header_len)
    elif header_len == 12:      # a length that the compiler knows: no call
        if memcmp(to.iov_base, header, 12) != 0:
            memcpy(to.iov_base, header, 12)
    elif memcmp(to.iov_base, header, header_len) != 0:
        memcpy(to.iov_base, header, header_len)


cdef inline void write_num_buffers(const iovec *segments, uint32_t n, uint16_t count) noexcept nogil:
    """Write num_buffers into a 12-byte header that stands at the start of a chain's segments."""
    if segments[0].iov_len >= 12:
        memcpy(<uint8_t *> segments[0].iov_base + 10, &count, 2)
    else:
        scatter(segments, n, 10, <const uint8_t *> &count, 2)


cdef inline uint32_t spread(burst *b, uint32_t first, uint32_t total) noexcept nogil:
    """Fill in used lengths of the chains from `first` on for a packet of `total` bytes. Returns how many it takes."""
    cdef uint32_t n = 0
    cdef uint32_t part
    while total:
        part = b.chains[first + n].writable
        if part > total:
            part = total
        b.used[first + n].len = part
        total -= part
        n += 1
    return n
