/* epoch.h - both sides of the read-copy-update domain, as far as they are compiled: one read-side section, and one look
 * of the update side at one reader. _epoch.pyx has the theory; a C program tests these very functions (tests/torture).
 */
#ifndef VMP_EPOCH_H
#define VMP_EPOCH_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>

#include "atomics.h"
#include "layout.h"

#define VMP_SPIN_NS 2000u       /* shorter than a sleep and a wake-up; never longer, the worker may need this very core */
#define VMP_SLICE_NS 2000000u   /* how long one futex sleep lasts before the worker's pidfd is looked at again */

enum vmp_reader { VMP_READER_LEFT, VMP_READER_DEAD, VMP_READER_STUCK };

/* Begin a read-side section. What is read from now on stays usable until vmp_section_exit. */
static inline void vmp_section_enter(vmp_worker *slot)
{
    /* ORDER R1 (reader): store slot.seq odd, then load device.generation          [full fence between]
     *   pairs with  R2 (epoch.h vmp_begin_scan: generation published, fence, scan of slot.seq)
     *   without it  the load may pass the store: the scanner sees us idle while we hold the old configuration, it
     *               retires it, we use unmapped memory.
     *   not needed  for the load of slot.seq: only this thread writes it, so relaxed (no order) is enough.
     *   shown by    tests/torture/test_epoch.py::test_no_use_after_retire
     */
    vmp_store_relaxed_u32(&slot->seq, vmp_load_relaxed_u32(&slot->seq) + 1);
    vmp_fence_full();
}

/* End the section: nothing read inside it may be used any more. */
static inline void vmp_section_exit(vmp_worker *slot)
{
    /* ORDER R3 (reader): every access of the section, then store slot.seq even    [release, part of the exchange]
     *   pairs with  R4 (epoch.h vmp_wait_for_reader: load-acquire of slot.seq)
     *   without it  an access of the section may be done after the store: the scanner sees the section ended and
     *               retires what the access still uses.
     *   shown by    tests/torture/test_epoch.py::test_no_use_after_retire
     * ORDER R5 (reader): store slot.seq even, then load slot.waiters               [full, part of the exchange]
     *   pairs with  R6 (epoch.h vmp_wait_for_reader: waiters raised, then slot.seq looked at again)
     *   without it  both sides may read the old value: the waiter sleeps on a section that has ended, until its slice
     *               of time is over (late, never wrong).
     *   shown by    tests/torture/test_epoch.py::test_waiter_is_woken
     */
    vmp_exchange_full_u32(&slot->seq, vmp_load_relaxed_u32(&slot->seq) + 1);
    if (vmp_load_relaxed_u32(&slot->waiters) != 0)
        vmp_futex_wake_all(&slot->seq);
}

/* Between two work items: end the section and begin another where somebody waits for its end, else let it go on, which
 * costs one load. What was read before is not to be used any more, in either case.
 *
 * No order of its own: whoever waits has raised slot.waiters and sees either this section, whose end it gets at the next
 * call, or one that was begun after (R1, R2). A late look at the word makes that later by one work item, never wrong.
 */
static inline void vmp_section_pass(vmp_worker *slot)
{
    if (vmp_load_relaxed_u32(&slot->waiters) != 0) {
        vmp_section_exit(slot);
        vmp_section_enter(slot);
    }
}

/* A pidfd is readable once its process has ended. A negative one is of a worker that was never started. */
static inline bool vmp_is_dead(int pidfd)
{
    struct pollfd p = {.fd = pidfd, .events = POLLIN, .revents = 0};
    return pidfd >= 0 && poll(&p, 1, 0) == 1 && (p.revents & POLLIN) != 0;
}

/* What was published is before the scan of the readers. */
static inline void vmp_begin_scan(void)
{
    /* ORDER R2 (updater): store device.generation, then load each slot.seq          [full fence between]
     *   pairs with  R1 (epoch.h vmp_section_enter: slot.seq odd, then device.generation loaded)
     *   without it  the scan may be done before the generation is visible: a worker enters, reads the old generation,
     *               and we have already taken it for idle.
     *   shown by    tests/torture/test_epoch.py::test_no_use_after_retire
     */
    vmp_fence_full();
}

/* Wait until a reader that is inside a section has left it, is dead, or until deadline_ns (vmp_now_ns). */
static inline enum vmp_reader vmp_wait_for_reader(vmp_worker *slot, int pidfd, uint64_t deadline_ns)
{
    /* ORDER R4 (updater): load slot.seq, then retire                              [acquire]
     *   pairs with  R3 (epoch.h vmp_section_exit: accesses of the section, then slot.seq even)
     *   without it  what the caller does to the old configuration may be done before the load.
     *   shown by    tests/torture/test_epoch.py::test_no_use_after_retire
     */
    uint32_t seen = vmp_load_acquire_u32(&slot->seq);
    uint64_t spin_end;
    enum vmp_reader result = VMP_READER_STUCK;
    if ((seen & 1) == 0)
        return VMP_READER_LEFT;
    /* ORDER R6 (updater): raise slot.waiters, then load slot.seq                  [full, part of the fetch_add]
     *   pairs with  R5 (epoch.h vmp_section_exit: slot.seq even, then slot.waiters looked at)
     *   without it  see R5: a sleep of one slice too much.
     *   shown by    tests/torture/test_epoch.py::test_waiter_is_woken
     */
    vmp_fetch_add_full_u32(&slot->waiters, 1);
    spin_end = vmp_now_ns() + VMP_SPIN_NS;
    for (;;) {
        /* ORDER R4 (updater): as above */
        if (vmp_load_acquire_u32(&slot->seq) != seen) {
            result = VMP_READER_LEFT;
            break;
        }
        if (vmp_now_ns() < spin_end) {
            vmp_cpu_relax();
            continue;
        }
        /* ORDER K2 (updater): load slot.life, then retire: the data thread's end is known before the process's is */
        if ((vmp_load_acquire_u32(&slot->life) & FUTEX_OWNER_DIED) != 0 || vmp_is_dead(pidfd)) {
            result = VMP_READER_DEAD;
            break;
        }
        if (vmp_now_ns() >= deadline_ns)
            break;
        /* Whatever it returns (woken, EAGAIN, EINTR, ETIMEDOUT), the word is looked at again. */
        (void)vmp_futex_wait(&slot->seq, seen, VMP_SLICE_NS);
    }
    /* ORDER R6 (updater): lowering needs no order of its own; the full one of fetch_add is harmless */
    vmp_fetch_add_full_u32(&slot->waiters, (uint32_t)-1);
    return result;
}

#endif
