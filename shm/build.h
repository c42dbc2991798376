/* build.h - what a build has in it or not; setup.py says which variable of the environment decides.
 *
 * VMP_JOURNAL       0 leaves the journal out (workers/_journal.pxd), to measure what it costs. Nobody serves with that,
 *                   nor with the next two.
 * VMP_CHECKS        0 leaves out whether what a driver of a ring says can be: heads, and where a buffer of one descriptor
 *                   lies (workers/_vring.pyx, _chain.pxd); and what headers ask for (_net.pxd).
 * VMP_COUNTERS      0 leaves out what is counted (atomics.h, vmp_count_u64).
 * VMP_KILL_POINTS   1 puts the kill points in: places of the data path at which a worker can be made to die. A test arms
 *                   one in the ring's slot (layout.py has the fields and KILL_POINTS their names). Else they are nothing.
 */
#ifndef VMP_BUILD_H
#define VMP_BUILD_H

#include <signal.h>
#include <unistd.h>

#include "layout.h"

#ifdef VMP_NO_JOURNAL
#define VMP_JOURNAL 0
#else
#define VMP_JOURNAL 1
#endif

#ifdef VMP_NO_CHECKS
#define VMP_CHECKS 0
#else
#define VMP_CHECKS 1
#endif

#ifdef VMP_NO_COUNTERS
#define VMP_COUNTERS 0
#else
#define VMP_COUNTERS 1
#endif

#ifdef VMP_WITH_KILL_POINTS
#define VMP_KILL_POINTS 1

static inline void vmp_kill_point(vmp_ring *slot, uint32_t point)
{
    volatile vmp_ring *ring = slot;
    if (ring->kill_point != point || --ring->kill_left)
        return;
    ring->kill_point = 0; /* once: not the replacement too */
    if (ring->kill_signal)
        raise((int)ring->kill_signal);
    else
        for (;;)
            pause(); /* the worker's other threads go on, so verbs do too, until they wait for this one */
}
#else
#define VMP_KILL_POINTS 0
#define vmp_kill_point(slot, point) ((void)(slot))
#endif

#endif
