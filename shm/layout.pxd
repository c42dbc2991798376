"""Cython's view of layout.h: every struct in shared memory.

Generated from shm/layout.py by `make layout`; edit that file, not this one.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "layout.h" nogil:
    enum:
        VMP_SEGMENT_VERSION
        VMP_SEGMENT_READY
        VMP_WORKERS_MAX
        VMP_DEVICES_MAX
        VMP_RINGS_MAX
        VMP_DROP_REASONS
        VMP_DROP_NULL
        VMP_DROP_SHORT
        VMP_DROP_OVERSIZE
        VMP_DROP_HEADER
        VMP_DROP_OFFLOAD
        VMP_DROP_DISABLED
        VMP_DROP_NO_ROOM
        VMP_DROP_BACKEND_FULL
        VMP_DROP_BACKEND_ERROR
        VMP_BROKEN_AVAIL_IDX
        VMP_BROKEN_HEAD
        VMP_BROKEN_NEXT
        VMP_BROKEN_LOOP
        VMP_BROKEN_INDIRECT
        VMP_BROKEN_INDIRECT_LEN
        VMP_BROKEN_ORDER
        VMP_BROKEN_ADDRESS
        VMP_BROKEN_LENGTH
        VMP_BROKEN_SEGMENTS
        VMP_BROKEN_DIRECTION
        VMP_BROKEN_MEMORY
        VMP_BROKEN_DEATHS
        VMP_REGION_VERSION
        VMP_REGION_DESC_NUM
        VMP_REGION_USED_IDX
        VMP_REGION_FREE_HEAD
        VMP_REGION_FREE_LIST
        VMP_REGION_INFLIGHT
        VMP_REGION_COUNTER
        VMP_REGION_CHAIN
        VMP_REGION_MEMORY
        VMP_JOURNAL_ENTRIES
        VMP_KILL_KICK_READ
        VMP_KILL_FETCHED
        VMP_KILL_BEGUN
        VMP_KILL_SENT
        VMP_KILL_RECEIVED
        VMP_KILL_HELD
        VMP_KILL_COPIED
        VMP_KILL_DELIVERED
        VMP_KILL_TRANSMITTED
        VMP_KILL_ANSWERED
        VMP_KILL_PROCESSED
        VMP_KILL_RETURNING
        VMP_KILL_RETURNED
        VMP_KILL_NOTED
        VMP_KILL_HALF_SHOWN
        VMP_KILL_SHOWN
        VMP_KILL_AVAIL_NOTED
        VMP_KILL_USED_NOTED
        VMP_KILL_UNMARKED
        VMP_KILL_PUBLISHED
        VMP_KILL_CALLING
        VMP_KILL_CALLED
        VMP_KILL_HUSHED
        VMP_KILL_ASKED
        VMP_KILL_SETTLING
        VMP_KILL_SETTLED
        VMP_WORKERS_OFFSET
        VMP_DEVICES_OFFSET
        VMP_RINGS_OFFSET
        VMP_SEGMENT_SIZE
    const uint64_t VMP_SEGMENT_MAGIC

    ctypedef struct vmp_header:
        uint64_t magic
        uint32_t version
        uint32_t state
        uint64_t size
        uint32_t owner_pid
        uint64_t owner_start

    ctypedef struct vmp_worker:
        uint32_t seq
        uint32_t waiters
        uint32_t doing
        uint32_t asleep
        uint32_t pid
        uint32_t restarts
        uint32_t life
        uint32_t fault
        uint32_t hangs
        uint64_t items
        uint64_t wakeups
        uint64_t polls
        uint64_t busy_ns
        uint64_t switch_ns
        uint64_t switches
        uint64_t log_dropped

    ctypedef struct vmp_device:
        uint64_t generation
        uint32_t rings
        uint32_t first_ring

    ctypedef struct vmp_ring:
        uint16_t last_avail_idx
        uint16_t used_idx
        uint16_t used_valid
        uint16_t batch_avail_idx
        uint16_t batch_used_idx
        uint16_t size
        uint32_t broken
        uint32_t worker
        uint32_t started
        uint32_t enabled
        uint16_t avail_idx
        uint16_t batch_start_idx
        uint64_t source_mac
        uint16_t batch_n
        uint16_t recover
        uint16_t region_fault
        uint16_t died
        uint16_t effect_idx
        uint16_t effect_valid
        uint32_t batch_waiting
        uint16_t slips_known
        uint32_t effect_ring
        uint64_t repeated_next
        uint64_t lost_next
        uint32_t kill_point
        uint32_t kill_left
        uint32_t kill_signal
        uint64_t begun_bursts
        uint32_t deaths
        uint32_t waiting
        uint64_t packets
        uint64_t bytes
        uint64_t kicks
        uint64_t calls
        uint64_t calls_suppressed
        uint64_t batches
        uint64_t copied
        uint64_t log_pages
        uint64_t log_outside
        uint64_t repeated
        uint64_t lost
        uint64_t drops[16]
        uint64_t miss_iova
        uint32_t miss
        uint32_t miss_version
        uint64_t iotlb_hits
        uint64_t iotlb_misses
        uint64_t iotlb_unusable
        uint32_t miss_begun
        uint64_t journal[260]
