/* layout.h - every struct in shared memory.
 * generated from shm/layout.py by `make layout`; edit that file, not this one. */
#ifndef VMP_LAYOUT_H
#define VMP_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#define VMP_SEGMENT_MAGIC UINT64_C(0x706d74736f6876)
#define VMP_SEGMENT_VERSION 4
#define VMP_SEGMENT_READY 1
#define VMP_WORKERS_MAX 64
#define VMP_DEVICES_MAX 1024
#define VMP_RINGS_MAX 4096
#define VMP_DROP_REASONS 9
#define VMP_DROP_NULL 0
#define VMP_DROP_SHORT 1
#define VMP_DROP_OVERSIZE 2
#define VMP_DROP_HEADER 3
#define VMP_DROP_OFFLOAD 4
#define VMP_DROP_DISABLED 5
#define VMP_DROP_NO_ROOM 6
#define VMP_DROP_BACKEND_FULL 7
#define VMP_DROP_BACKEND_ERROR 8
#define VMP_BROKEN_AVAIL_IDX 1
#define VMP_BROKEN_HEAD 2
#define VMP_BROKEN_NEXT 3
#define VMP_BROKEN_LOOP 4
#define VMP_BROKEN_INDIRECT 5
#define VMP_BROKEN_INDIRECT_LEN 6
#define VMP_BROKEN_ORDER 7
#define VMP_BROKEN_ADDRESS 8
#define VMP_BROKEN_LENGTH 9
#define VMP_BROKEN_SEGMENTS 10
#define VMP_BROKEN_DIRECTION 11
#define VMP_BROKEN_MEMORY 12
#define VMP_BROKEN_DEATHS 13
#define VMP_REGION_VERSION 1
#define VMP_REGION_DESC_NUM 2
#define VMP_REGION_USED_IDX 3
#define VMP_REGION_FREE_HEAD 4
#define VMP_REGION_FREE_LIST 5
#define VMP_REGION_INFLIGHT 6
#define VMP_REGION_COUNTER 7
#define VMP_REGION_CHAIN 8
#define VMP_REGION_MEMORY 9
#define VMP_JOURNAL_ENTRIES 64
#define VMP_KILL_KICK_READ 1
#define VMP_KILL_FETCHED 2
#define VMP_KILL_BEGUN 3
#define VMP_KILL_SENT 4
#define VMP_KILL_RECEIVED 5
#define VMP_KILL_HELD 6
#define VMP_KILL_COPIED 7
#define VMP_KILL_DELIVERED 8
#define VMP_KILL_TRANSMITTED 9
#define VMP_KILL_ANSWERED 10
#define VMP_KILL_PROCESSED 11
#define VMP_KILL_RETURNING 12
#define VMP_KILL_RETURNED 13
#define VMP_KILL_NOTED 14
#define VMP_KILL_HALF_SHOWN 15
#define VMP_KILL_SHOWN 16
#define VMP_KILL_AVAIL_NOTED 17
#define VMP_KILL_USED_NOTED 18
#define VMP_KILL_UNMARKED 19
#define VMP_KILL_PUBLISHED 20
#define VMP_KILL_CALLING 21
#define VMP_KILL_CALLED 22
#define VMP_KILL_HUSHED 23
#define VMP_KILL_ASKED 24
#define VMP_KILL_SETTLING 25
#define VMP_KILL_SETTLED 26
#define VMP_WORKERS_OFFSET 4096
#define VMP_DEVICES_OFFSET 20480
#define VMP_RINGS_OFFSET 151552
#define VMP_SEGMENT_SIZE 11161600

/* What the segment is and whose. */
typedef struct {
    /* SEGMENT_MAGIC. Writer: control. Readers: all. */
    uint64_t magic;
    /* SEGMENT_VERSION; another one is refused. Writer: control. Readers: all. */
    uint32_t version;
    /* 0 while being made, then SEGMENT_READY (store-release): openers wait for it. Writer: control. Readers: all. */
    uint32_t state;
    /* bytes of the whole segment. Writer: control. Readers: all. */
    uint64_t size;
    /* the control process. Writer: control. Readers: all. */
    uint32_t owner_pid;
    uint8_t pad_28[4];
    /* its start time in clock ticks since boot: pid and start name a process for good. Writer: control. Readers:
     * all. */
    uint64_t owner_start;
    uint8_t pad_40[4056];
} vmp_header;
_Static_assert(offsetof(vmp_header, magic) == 0, "vmp_header.magic");
_Static_assert(offsetof(vmp_header, version) == 8, "vmp_header.version");
_Static_assert(offsetof(vmp_header, state) == 12, "vmp_header.state");
_Static_assert(offsetof(vmp_header, size) == 16, "vmp_header.size");
_Static_assert(offsetof(vmp_header, owner_pid) == 24, "vmp_header.owner_pid");
_Static_assert(offsetof(vmp_header, owner_start) == 32, "vmp_header.owner_start");
_Static_assert(sizeof(vmp_header) == 4096, "sizeof vmp_header");

/* A worker's reader slot and counters. */
typedef struct {
    /* odd inside a read-side section; a futex. Writer: worker. Readers: control. */
    uint32_t seq;
    /* synchronize() calls that wait for seq. Writer: control. Readers: worker. */
    uint32_t waiters;
    /* 1 + ring number being served, 0 outside. Writer: worker. Readers: control. */
    uint32_t doing;
    /* 1 while blocked in epoll. Writer: worker. Readers: control. */
    uint32_t asleep;
    /* 0: no worker has this slot. Writer: control. Readers: all. */
    uint32_t pid;
    /* how often the worker of this slot was replaced. Writer: control. Readers: all. */
    uint32_t restarts;
    /* robust futex of the data thread: FUTEX_WAITERS and its id, or FUTEX_OWNER_DIED once it has ended; 0: not
     * begun. Writer: worker, then the kernel. Readers: control. */
    uint32_t life;
    /* signal that it is dying of by its own doing. Writer: worker. Readers: control. */
    uint32_t fault;
    /* how often the watchdog killed the worker of this slot. Writer: control. Readers: all. */
    uint32_t hangs;
    uint8_t pad_36[92];
    /* work items run. Writer: worker. Readers: all. */
    uint64_t items;
    /* returns from a blocking epoll_wait. Writer: worker. Readers: all. */
    uint64_t wakeups;
    /* empty polls while busy-polling. Writer: worker. Readers: all. */
    uint64_t polls;
    /* time inside work items that moved packets, nanoseconds. Writer: worker. Readers: all. */
    uint64_t busy_ns;
    /* gap that the last change of generation left between two work items, nanoseconds. Writer: worker. Readers:
     * all. */
    uint64_t switch_ns;
    /* changes of generation seen. Writer: worker. Readers: all. */
    uint64_t switches;
    /* log records that the control process did not take in time. Writer: worker. Readers: all. */
    uint64_t log_dropped;
    uint8_t pad_184[72];
} vmp_worker;
_Static_assert(offsetof(vmp_worker, seq) == 0, "vmp_worker.seq");
_Static_assert(offsetof(vmp_worker, waiters) == 4, "vmp_worker.waiters");
_Static_assert(offsetof(vmp_worker, doing) == 8, "vmp_worker.doing");
_Static_assert(offsetof(vmp_worker, asleep) == 12, "vmp_worker.asleep");
_Static_assert(offsetof(vmp_worker, pid) == 16, "vmp_worker.pid");
_Static_assert(offsetof(vmp_worker, restarts) == 20, "vmp_worker.restarts");
_Static_assert(offsetof(vmp_worker, life) == 24, "vmp_worker.life");
_Static_assert(offsetof(vmp_worker, fault) == 28, "vmp_worker.fault");
_Static_assert(offsetof(vmp_worker, hangs) == 32, "vmp_worker.hangs");
_Static_assert(offsetof(vmp_worker, items) == 128, "vmp_worker.items");
_Static_assert(offsetof(vmp_worker, wakeups) == 136, "vmp_worker.wakeups");
_Static_assert(offsetof(vmp_worker, polls) == 144, "vmp_worker.polls");
_Static_assert(offsetof(vmp_worker, busy_ns) == 152, "vmp_worker.busy_ns");
_Static_assert(offsetof(vmp_worker, switch_ns) == 160, "vmp_worker.switch_ns");
_Static_assert(offsetof(vmp_worker, switches) == 168, "vmp_worker.switches");
_Static_assert(offsetof(vmp_worker, log_dropped) == 176, "vmp_worker.log_dropped");
_Static_assert(sizeof(vmp_worker) == 256, "sizeof vmp_worker");

/* The published generation of a device. */
typedef struct {
    /* the published configuration (store-release); 0: no device here. Writer: control. Readers: all. */
    uint64_t generation;
    /* how many ring slots it has. Writer: control. Readers: all. */
    uint32_t rings;
    /* the first of them. Writer: control. Readers: all. */
    uint32_t first_ring;
    uint8_t pad_16[112];
} vmp_device;
_Static_assert(offsetof(vmp_device, generation) == 0, "vmp_device.generation");
_Static_assert(offsetof(vmp_device, rings) == 8, "vmp_device.rings");
_Static_assert(offsetof(vmp_device, first_ring) == 12, "vmp_device.first_ring");
_Static_assert(sizeof(vmp_device) == 128, "sizeof vmp_device");

/* One virtqueue. */
typedef struct {
    /* next available entry to take. Writer: worker, control while stopped. Readers: all. */
    uint16_t last_avail_idx;
    /* used index published to the driver. Writer: worker, control while stopped. Readers: all. */
    uint16_t used_idx;
    /* 0: used_idx is to be read from the ring. Writer: worker, control while stopped. Readers: all. */
    uint16_t used_valid;
    /* last_avail_idx once the batch being published is out. Writer: worker. Readers: all. */
    uint16_t batch_avail_idx;
    /* used_idx once the batch being published is out. Writer: worker. Readers: all. */
    uint16_t batch_used_idx;
    /* entries, 0 until set. Writer: control. Readers: all. */
    uint16_t size;
    /* a BROKEN_ reason, 0 when whole. Writer: worker, control while stopped. Readers: all. */
    uint32_t broken;
    /* 1 + worker slot that serves it, 0: none. Writer: control. Readers: all. */
    uint32_t worker;
    /* 1 while started. Writer: control. Readers: all. */
    uint32_t started;
    /* 1 while enabled. Writer: control. Readers: all. */
    uint32_t enabled;
    /* the driver's index when last looked at. Writer: worker. Readers: all. */
    uint16_t avail_idx;
    /* packed: used_idx before the batch being published. Writer: worker. Readers: all. */
    uint16_t batch_start_idx;
    /* Ethernet source of a frame the guest sent: byte 0 in the low byte. Writer: worker. Readers: all. */
    uint64_t source_mac;
    /* packed: chains in the batch being published, 0: none is. Writer: worker, control while stopped. Readers:
     * all. */
    uint16_t batch_n;
    /* packed: 1 when it was started for the first time since the front-end gave its region of what is in flight:
     * that says where it stands, if anybody has begun it. Writer: control. Readers: all. */
    uint16_t recover;
    /* packed: a REGION_FAULTS index: why that region was not taken; 0: it was, or there is none. Writer: worker.
     * Readers: all. */
    uint16_t region_fault;
    /* 1: the worker that served it has died, and nobody has taken it up since. Writer: control, worker once it has
     * taken the ring up. Readers: all. */
    uint16_t died;
    /* loopback, patch: the partner's used_idx before what is begun: while it is that, nothing came of it. Writer:
     * worker. Readers: all. */
    uint16_t effect_idx;
    /* 1: effect_idx means something. Writer: worker. Readers: all. */
    uint16_t effect_valid;
    /* 1 + `waiting` once the batch being published is out; 0: that does not change it. Writer: worker. Readers:
     * all. */
    uint32_t batch_waiting;
    /* 1: the next two are what `repeated` and `lost` are once a death is counted. Writer: worker. Readers: all. */
    uint16_t slips_known;
    uint8_t pad_58[2];
    /* of which ring slot, in bits 0-30; bit 31: a packed one. Writer: worker. Readers: all. */
    uint32_t effect_ring;
    /* `repeated` with the last death in it. Writer: worker. Readers: all. */
    uint64_t repeated_next;
    /* `lost` with the last death in it. Writer: worker. Readers: all. */
    uint64_t lost_next;
    /* 1 + place in KILL_POINTS; 0: none. Writer: tests, worker. Readers: worker. */
    uint32_t kill_point;
    /* dies at this pass, 1: the next one. Writer: tests, worker. Readers: worker. */
    uint32_t kill_left;
    /* of this signal; 0: it stays there until it is killed, its other threads go on. Writer: tests. Readers:
     * worker. */
    uint32_t kill_signal;
    uint8_t pad_92[4];
    /* frames of a batch of several bursts that were begun and are done again after a death, without entries in the
     * journal: 16 bits each burst, that which is published next in the lowest. Writer: worker. Readers: all. */
    uint64_t begun_bursts;
    uint8_t pad_104[12];
    /* workers that died in a work item of it, since it was registered. Writer: control. Readers: all. */
    uint32_t deaths;
    /* frames that were taken from the back-end and wait in the worker's memory for buffers. Writer: worker.
     * Readers: all. */
    uint32_t waiting;
    uint8_t pad_124[4];
    /* packets that went through. Writer: worker. Readers: all. */
    uint64_t packets;
    /* their bytes, without the virtio header. Writer: worker. Readers: all. */
    uint64_t bytes;
    /* notifications from the driver that were read. Writer: worker. Readers: all. */
    uint64_t kicks;
    /* interrupts sent. Writer: worker. Readers: all. */
    uint64_t calls;
    /* interrupts the driver did not want. Writer: worker. Readers: all. */
    uint64_t calls_suppressed;
    /* used index updates. Writer: worker. Readers: all. */
    uint64_t batches;
    /* bytes of frames that the worker itself copied. Writer: worker. Readers: all. */
    uint64_t copied;
    /* bits of the dirty log set that were clear. Writer: worker. Readers: all. */
    uint64_t log_pages;
    /* written pages for which the dirty log has no bit. Writer: worker. Readers: all. */
    uint64_t log_outside;
    /* packets or requests that a worker had begun when it died, and its replacement did again. Writer: worker.
     * Readers: all. */
    uint64_t repeated;
    /* packets taken from the back-end that a worker took with it. Writer: worker. Readers: all. */
    uint64_t lost;
    uint8_t pad_216[40];
    /* by DROP_ reason. Writer: worker. Readers: all. */
    uint64_t drops[16];
    /* what it needs an IOTLB entry for. Writer: worker. Readers: control. */
    uint64_t miss_iova;
    /* bits 0-1: access that it needs (1 to read, 2 to write); above: counts the reports. Writer: worker. Readers:
     * control. */
    uint32_t miss;
    /* the IOTLB's when it was missed. Writer: worker. Readers: control. */
    uint32_t miss_version;
    /* look-ups in the IOTLB that found an entry. Writer: worker. Readers: all. */
    uint64_t iotlb_hits;
    /* look-ups that did not, and were reported. Writer: worker. Readers: all. */
    uint64_t iotlb_misses;
    /* entries found that guest memory does not hold. Writer: worker. Readers: all. */
    uint64_t iotlb_unusable;
    /* what `miss` is or is about to be. Writer: worker. Readers: control. */
    uint32_t miss_begun;
    uint8_t pad_428[84];
    /* what is taken, done and not published, in the layout of vhost-user's region of what is in flight: 64 entries
     * of 16 (split) or 32 (packed) bytes (workers/_journal.pxd). Writer: worker. Readers: all. */
    uint64_t journal[260];
    uint8_t pad_2592[96];
} vmp_ring;
_Static_assert(offsetof(vmp_ring, last_avail_idx) == 0, "vmp_ring.last_avail_idx");
_Static_assert(offsetof(vmp_ring, used_idx) == 2, "vmp_ring.used_idx");
_Static_assert(offsetof(vmp_ring, used_valid) == 4, "vmp_ring.used_valid");
_Static_assert(offsetof(vmp_ring, batch_avail_idx) == 6, "vmp_ring.batch_avail_idx");
_Static_assert(offsetof(vmp_ring, batch_used_idx) == 8, "vmp_ring.batch_used_idx");
_Static_assert(offsetof(vmp_ring, size) == 10, "vmp_ring.size");
_Static_assert(offsetof(vmp_ring, broken) == 12, "vmp_ring.broken");
_Static_assert(offsetof(vmp_ring, worker) == 16, "vmp_ring.worker");
_Static_assert(offsetof(vmp_ring, started) == 20, "vmp_ring.started");
_Static_assert(offsetof(vmp_ring, enabled) == 24, "vmp_ring.enabled");
_Static_assert(offsetof(vmp_ring, avail_idx) == 28, "vmp_ring.avail_idx");
_Static_assert(offsetof(vmp_ring, batch_start_idx) == 30, "vmp_ring.batch_start_idx");
_Static_assert(offsetof(vmp_ring, source_mac) == 32, "vmp_ring.source_mac");
_Static_assert(offsetof(vmp_ring, batch_n) == 40, "vmp_ring.batch_n");
_Static_assert(offsetof(vmp_ring, recover) == 42, "vmp_ring.recover");
_Static_assert(offsetof(vmp_ring, region_fault) == 44, "vmp_ring.region_fault");
_Static_assert(offsetof(vmp_ring, died) == 46, "vmp_ring.died");
_Static_assert(offsetof(vmp_ring, effect_idx) == 48, "vmp_ring.effect_idx");
_Static_assert(offsetof(vmp_ring, effect_valid) == 50, "vmp_ring.effect_valid");
_Static_assert(offsetof(vmp_ring, batch_waiting) == 52, "vmp_ring.batch_waiting");
_Static_assert(offsetof(vmp_ring, slips_known) == 56, "vmp_ring.slips_known");
_Static_assert(offsetof(vmp_ring, effect_ring) == 60, "vmp_ring.effect_ring");
_Static_assert(offsetof(vmp_ring, repeated_next) == 64, "vmp_ring.repeated_next");
_Static_assert(offsetof(vmp_ring, lost_next) == 72, "vmp_ring.lost_next");
_Static_assert(offsetof(vmp_ring, kill_point) == 80, "vmp_ring.kill_point");
_Static_assert(offsetof(vmp_ring, kill_left) == 84, "vmp_ring.kill_left");
_Static_assert(offsetof(vmp_ring, kill_signal) == 88, "vmp_ring.kill_signal");
_Static_assert(offsetof(vmp_ring, begun_bursts) == 96, "vmp_ring.begun_bursts");
_Static_assert(offsetof(vmp_ring, deaths) == 116, "vmp_ring.deaths");
_Static_assert(offsetof(vmp_ring, waiting) == 120, "vmp_ring.waiting");
_Static_assert(offsetof(vmp_ring, packets) == 128, "vmp_ring.packets");
_Static_assert(offsetof(vmp_ring, bytes) == 136, "vmp_ring.bytes");
_Static_assert(offsetof(vmp_ring, kicks) == 144, "vmp_ring.kicks");
_Static_assert(offsetof(vmp_ring, calls) == 152, "vmp_ring.calls");
_Static_assert(offsetof(vmp_ring, calls_suppressed) == 160, "vmp_ring.calls_suppressed");
_Static_assert(offsetof(vmp_ring, batches) == 168, "vmp_ring.batches");
_Static_assert(offsetof(vmp_ring, copied) == 176, "vmp_ring.copied");
_Static_assert(offsetof(vmp_ring, log_pages) == 184, "vmp_ring.log_pages");
_Static_assert(offsetof(vmp_ring, log_outside) == 192, "vmp_ring.log_outside");
_Static_assert(offsetof(vmp_ring, repeated) == 200, "vmp_ring.repeated");
_Static_assert(offsetof(vmp_ring, lost) == 208, "vmp_ring.lost");
_Static_assert(offsetof(vmp_ring, drops) == 256, "vmp_ring.drops");
_Static_assert(offsetof(vmp_ring, miss_iova) == 384, "vmp_ring.miss_iova");
_Static_assert(offsetof(vmp_ring, miss) == 392, "vmp_ring.miss");
_Static_assert(offsetof(vmp_ring, miss_version) == 396, "vmp_ring.miss_version");
_Static_assert(offsetof(vmp_ring, iotlb_hits) == 400, "vmp_ring.iotlb_hits");
_Static_assert(offsetof(vmp_ring, iotlb_misses) == 408, "vmp_ring.iotlb_misses");
_Static_assert(offsetof(vmp_ring, iotlb_unusable) == 416, "vmp_ring.iotlb_unusable");
_Static_assert(offsetof(vmp_ring, miss_begun) == 424, "vmp_ring.miss_begun");
_Static_assert(offsetof(vmp_ring, journal) == 512, "vmp_ring.journal");
_Static_assert(sizeof(vmp_ring) == 2688, "sizeof vmp_ring");

#endif
/* SEGMENT_VERSION 4: layout c8678d89cd6b51168371c9f513f5e4da */
