"""The frame of the software guest: every byte of it follows from a sequence number, a generation and a length.

Layout (host byte order: it never leaves the machine): 0 destination, 6 source, 12 type 0x88b5 (local experiments),
14 length, 16 sequence number, 24 generation of guest memory it was written in, 28 flags, 32 pattern up to the end.
The two addresses may come back exchanged, which is what loopbacks on real networks do; everything else as it was sent.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef enum:
    FRAME_MIN = 48
    FRAME_MAX = 1514
    FLAG_HOLD = 1           # asks the Python loopback to dwell on the batch (tools/demo_backend.py)


cdef inline uint64_t pattern_of(uint64_t seq, uint32_t generation, uint32_t flags) noexcept nogil:
    """Start of a frame's pattern: the finalizer of splitmix64 over the three numbers."""
    # The odd factor keeps every bit of the second word, and keeps the two words apart.
    cdef uint64_t x = seq ^ ((<uint64_t> generation << 32 | flags) * 0x9e3779b97f4a7c15ULL) ^ 0x9e3779b97f4a7c15ULL
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL
    return x ^ (x >> 31)


cdef inline void frame_make(
    uint8_t *frame, uint64_t seq, uint32_t generation, uint32_t flags, uint32_t size
) noexcept nogil:
    """Write frame number `seq`, `size` bytes."""
    cdef uint64_t word = pattern_of(seq, generation, flags)
    cdef uint32_t at = 32
    cdef uint16_t length = <uint16_t> size
    memcpy(frame, <const char *> b"\x02vmp\0\x02\x02vmp\0\x01\x88\xb5", 14)
    memcpy(frame + 14, &length, 2)
    memcpy(frame + 16, &seq, 8)
    memcpy(frame + 24, &generation, 4)
    memcpy(frame + 28, &flags, 4)
    while at + 8 <= size:
        memcpy(frame + at, &word, 8)
        word += 0x9e3779b97f4a7c15ULL
        at += 8
    if at < size:
        memcpy(frame + at, &word, size - at)


cdef inline bint frame_good(const uint8_t *frame, uint32_t size, uint64_t *seq, uint32_t *generation) noexcept nogil:
    """Check every byte of a frame of `size` bytes; its number and generation are only meant when it is good."""
    cdef uint32_t flags
    cdef uint16_t length
    cdef uint64_t word, found, wrong = 0
    cdef uint32_t at = 32
    memcpy(&length, frame + 14, 2)
    memcpy(seq, frame + 16, 8)
    memcpy(generation, frame + 24, 4)
    memcpy(&flags, frame + 28, 4)
    if length != size or frame[12] != 0x88 or frame[13] != 0xb5 or frame[5] ^ frame[11] != 3:
        return False
    if memcmp(frame, <const char *> b"\x02vmp\0", 5) != 0 or memcmp(frame + 6, <const char *> b"\x02vmp\0", 5) != 0:
        return False
    word = pattern_of(seq[0], generation[0], flags)
    while at + 8 <= size:
        memcpy(&found, frame + at, 8)
        wrong |= found ^ word
        word += 0x9e3779b97f4a7c15ULL
        at += 8
    return wrong == 0 and (at == size or memcmp(frame + at, &word, size - at) == 0)
