/* Threads that use shm/atomics.h and shm/epoch.h as vhostmp's processes do, for ThreadSanitizer to watch.
 *
 * What the protocols hand from one thread to another is plain memory here: ThreadSanitizer reports every access to it
 * that no acquire and release order, whether or not it went wrong. It knows nothing of fences (that of x86-64 is an
 * instruction it does not look at), and no argument of ours needs them for that: a fence keeps a load behind a store,
 * which orders no data. What they are for shows in values, and those the threads check themselves.
 *
 *     atomics epoch MS      readers use what is in force while it is swapped: what is retired is poisoned
 *     atomics move MS       a ring moves between two workers: two generations, as vhostmp/steps.py has it
 *     atomics ring MS       driver and device of a split ring, with EVENT_IDX both ways, who sleeps until he is told
 *     atomics seqlock MS    the IOTLB's sequence lock
 *
 * PLANT is defined to plant a mistake: each has to be found. Exit status: 0, 1 (a value is wrong; says which), or 66
 * (ThreadSanitizer's).
 */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>

#include "atomics.h"

#define NONE 0
#define RELAXED_EXIT 1       /* a section's end releases nothing */
#define RELAXED_LOOK 2       /* the scan of the readers acquires nothing */
#define NO_WAIT 3            /* the updater does not wait for readers */
#define RELAXED_PUBLISH 4    /* the generation is published without release */
#define ONE_GENERATION 5     /* a ring moves with no generation in which nobody serves it */
#define RELAXED_AVAIL 6      /* the driver stores avail->idx without release */
#define RELAXED_USED 7       /* the device stores used->idx without release */
#define NO_LOOK_AGAIN 8      /* who goes to sleep does not look again */
#define NO_SECOND_LOOK 9     /* a reader of the sequence lock does not look at the number again */
#ifndef PLANT
#define PLANT NONE
#endif

#if PLANT == RELAXED_EXIT
static inline uint32_t relaxed_exchange(uint32_t *p, uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }
#define vmp_exchange_full_u32 relaxed_exchange
#endif
#if PLANT == RELAXED_LOOK
#define vmp_load_acquire_u32 vmp_load_relaxed_u32
#endif
#include "epoch.h"

#define LINE __attribute__((aligned(64)))
#define ELEMENTS 4
#define WORDS 8
#define POISON UINT64_C(0xDEADBEEFDEADBEEF)

static uint64_t deadline;
static LINE uint32_t stop;
static LINE vmp_worker workers[2];
static LINE uint64_t generation;

static void fail(const char *why)
{
    fprintf(stderr, "%s\n", why);
    _exit(1);
}

static int over(void) { return vmp_now_ns() > deadline; }

static void publish(uint64_t number)
{
#if PLANT == RELAXED_PUBLISH
    vmp_store_relaxed_u64(&generation, number);
#else
    vmp_store_release_u64(&generation, number);
#endif
}

static void synchronize(void)
{
    vmp_begin_scan();
    for (int i = 0; i < 2 && PLANT != NO_WAIT; i++)
        if (vmp_wait_for_reader(&workers[i], -1, UINT64_MAX) != VMP_READER_LEFT)
            fail("a reader is stuck");
}

/* ---- epoch */

static LINE uint64_t elements[ELEMENTS][WORDS];

static void *epoch_reader(void *slot)
{
    uint64_t sections = 0;
    vmp_section_enter(slot);
    while (!vmp_load_relaxed_u32(&stop)) {
        uint64_t number = vmp_load_acquire_u64(&generation);
        for (int i = 0; i < WORDS; i++)
            if (elements[number % ELEMENTS][i] != number)
                fail("what was retired is used");
        if (sections++ % 4)     /* now and then it has to wait for something */
            vmp_section_pass(slot);
        else {
            vmp_section_exit(slot);
            vmp_section_enter(slot);
        }
    }
    vmp_section_exit(slot);
    return (void *)sections;
}

static uint64_t epoch_updater(void)
{
    uint64_t number = 0;
    while (!over()) {
        number++;
        for (int i = 0; i < WORDS; i++)
            elements[number % ELEMENTS][i] = number;
        publish(number);
        synchronize();
        for (int i = 0; i < WORDS; i++)
            elements[(number - 1) % ELEMENTS][i] = POISON;
    }
    return number;
}

/* ---- move: in generation g worker g / 2 % 2 serves the ring where g is even, nobody where it is odd */

static LINE uint64_t ring_taken, ring_given_back;

static void *move_worker(void *slot)
{
    uint64_t me = (vmp_worker *)slot == &workers[1];
    uint64_t served = 0;
    while (!vmp_load_relaxed_u32(&stop)) {
        vmp_section_enter(slot);
        uint64_t number = vmp_load_acquire_u64(&generation);
        if (number % 2 == 0 && number / 2 % 2 == me) {
            if (ring_taken != ring_given_back)
                fail("a ring is taken up in the middle of a batch");
            ring_taken++;
            served++;
            ring_given_back++;
        }
        vmp_section_exit(slot);
    }
    return (void *)served;
}

static uint64_t mover(void)
{
    uint64_t number = 0;
    while (!over()) {
        number += PLANT == ONE_GENERATION ? 2 : 1;
        publish(number);
        synchronize();
    }
    return number / 2;
}

/* ---- ring */

#define NUM 64
static struct {
    uint64_t buffer[NUM];
    uint16_t avail[NUM], used[NUM];
    LINE uint16_t avail_idx;
    LINE uint16_t used_idx;
    LINE uint16_t used_event;
    LINE uint16_t avail_event;
    int kick, call;
} ring;

static int wants(uint16_t event, uint16_t new, uint16_t old) { return (uint16_t)(new - event - 1) < (uint16_t)(new - old); }

static void tell(int fd)
{
    uint64_t one = 1;
    if (write(fd, &one, sizeof one) != sizeof one)
        fail("eventfd");
}

/* Sleep until told. Nobody sleeps for half a minute but who was forgotten. */
static void sleep_on(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN, .revents = 0};
    uint64_t count;
    for (int slices = 0; poll(&p, 1, 100) == 0; slices++) {
        if (vmp_load_relaxed_u32(&stop))
            return;
        if (slices == (PLANT == NONE ? 300 : 10))
            fail("one side sleeps, the other has not told it");
    }
    if (read(fd, &count, sizeof count) != sizeof count)
        fail("eventfd");
}

static void *ring_device(void *unused)
{
    uint16_t last = 0, seen = 0;
    uint64_t packets = 0;
    (void)unused;
    while (!vmp_load_relaxed_u32(&stop)) {
        seen = vmp_load_acquire_u16(&ring.avail_idx);
        if (seen == last) {
            for (int i = 0; i < 2000 && PLANT == NO_LOOK_AGAIN; i++)
                vmp_cpu_relax(); /* the moment in which something may come is made longer */
            vmp_store_relaxed_u16(&ring.avail_event, last);
            vmp_fence_full();
            if (vmp_load_relaxed_u16(&ring.avail_idx) == last || PLANT == NO_LOOK_AGAIN)
                sleep_on(ring.kick);
            continue;
        }
        uint16_t old = last;
        while (last != seen) {
            uint16_t head = ring.avail[last % NUM];
            if (ring.buffer[head] % NUM != head)
                fail("a buffer is not the driver's");
            ring.buffer[head] += NUM;
            ring.used[last % NUM] = head;
            last++;
            packets++;
        }
#if PLANT == RELAXED_USED
        vmp_store_relaxed_u16(&ring.used_idx, last);
#else
        vmp_store_release_u16(&ring.used_idx, last);
#endif
        vmp_fence_full();
        if (wants(vmp_load_relaxed_u16(&ring.used_event), last, old))
            tell(ring.call);
    }
    return (void *)packets;
}

static uint64_t ring_driver(void)
{
    uint16_t idx = 0, reaped = 0;
    uint64_t packets = 0, turns = 0;
    while (!over()) {
        uint16_t old = idx;
        uint16_t room = NUM - (uint16_t)(idx - reaped);
        uint16_t burst = 1 + turns++ % 7;
        for (uint16_t i = 0; i < room && i < burst; i++, idx++) {
            ring.buffer[idx % NUM] = idx % NUM;
            ring.avail[idx % NUM] = idx % NUM;
        }
#if PLANT == RELAXED_AVAIL
        vmp_store_relaxed_u16(&ring.avail_idx, idx);
#else
        vmp_store_release_u16(&ring.avail_idx, idx);
#endif
        vmp_fence_full();
        if (wants(vmp_load_relaxed_u16(&ring.avail_event), idx, old))
            tell(ring.kick);
        uint16_t done = vmp_load_acquire_u16(&ring.used_idx);
        if (done == reaped) {
            vmp_store_relaxed_u16(&ring.used_event, reaped);
            vmp_fence_full();
            if (vmp_load_relaxed_u16(&ring.used_idx) == reaped)
                sleep_on(ring.call);
            continue;
        }
        for (; reaped != done; reaped++, packets++)
            if (ring.buffer[ring.used[reaped % NUM]] != NUM + (uint64_t)(reaped % NUM))
                fail("a buffer came back as it was not given");
    }
    return packets;
}

/* ---- seqlock: as shm/_iotlb.pyx has it */

static struct {
    LINE uint32_t seq;
    LINE uint64_t iova;
    LINE uint64_t last;
} table;

static void *seqlock_reader(void *unused)
{
    uint64_t found = 0;
    (void)unused;
    while (!vmp_load_relaxed_u32(&stop)) {
        uint32_t seq = vmp_load_acquire_u32(&table.seq);
        uint64_t iova = vmp_load_acquire_u64(&table.iova);
        uint64_t last = vmp_load_acquire_u64(&table.last);
        if (seq % 2 || (PLANT != NO_SECOND_LOOK && vmp_load_relaxed_u32(&table.seq) != seq))
            continue;
        if (last != iova)
            fail("an entry is torn");
        found++;
    }
    return (void *)found;
}

static uint64_t seqlock_writer(void)
{
    uint64_t turns = 0;
    while (!over()) {
        turns++;
        vmp_store_relaxed_u32(&table.seq, table.seq + 1);
        vmp_store_release_u64(&table.iova, turns);
        vmp_store_release_u64(&table.last, turns);
        vmp_store_release_u32(&table.seq, table.seq + 1);
    }
    return turns;
}

/* ---- */

static const struct {
    const char *name;
    void *(*other)(void *);
    uint64_t (*one)(void);
    int others;
} PATTERNS[] = {
    {"epoch", epoch_reader, epoch_updater, 2},
    {"move", move_worker, mover, 2},
    {"ring", ring_device, ring_driver, 1},
    {"seqlock", seqlock_reader, seqlock_writer, 2},
};

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    ring.kick = eventfd(0, 0);
    ring.call = eventfd(0, 0);
    for (size_t p = 0; p < sizeof PATTERNS / sizeof *PATTERNS; p++) {
        pthread_t threads[2];
        if (strcmp(argv[1], PATTERNS[p].name) != 0)
            continue;
        deadline = vmp_now_ns() + strtoull(argv[2], NULL, 10) * 1000000u;
        for (int i = 0; i < PATTERNS[p].others; i++)
            if (pthread_create(&threads[i], NULL, PATTERNS[p].other, &workers[i]) != 0)
                fail("pthread_create");
        printf("%s: %llu", argv[1], (unsigned long long)PATTERNS[p].one());
        vmp_store_relaxed_u32(&stop, 1);
        for (int i = 0; i < PATTERNS[p].others; i++) {
            void *count;
            pthread_join(threads[i], &count);
            printf(" %llu", (unsigned long long)(uintptr_t)count);
        }
        printf("\n");
        return 0;
    }
    return 2;
}
