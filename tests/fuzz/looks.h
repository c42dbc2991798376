/* looks.h - included before everything else in the build for libFuzzer: each look at shared memory is told to the target.
 *
 * A guest may change what was looked at right afterwards. The target does that (_guest.pxd, guest_looked), so that code
 * which looks twice gets two answers, in one thread and each time the same.
 */
#ifndef VMP_FUZZ_LOOKS_H
#define VMP_FUZZ_LOOKS_H

#include <string.h>

#define vmp_load_relaxed_u16 vmp_quiet_load_relaxed_u16
#define vmp_load_acquire_u16 vmp_quiet_load_acquire_u16
#define vmp_load_relaxed_u32 vmp_quiet_load_relaxed_u32
#define vmp_load_relaxed_u64 vmp_quiet_load_relaxed_u64
#include "atomics.h"
#undef vmp_load_relaxed_u16
#undef vmp_load_acquire_u16
#undef vmp_load_relaxed_u32
#undef vmp_load_relaxed_u64

extern void (*vmp_fuzz_looked)(const void *at, size_t size); /* engine.c */

#define VMP_TELL_LOOKS(name, type)                                                                                     \
    static inline type vmp_load_##name(const type *p)                                                                  \
    {                                                                                                                  \
        type value = vmp_quiet_load_##name(p);                                                                         \
        if (vmp_fuzz_looked)                                                                                           \
            vmp_fuzz_looked(p, sizeof(value));                                                                         \
        return value;                                                                                                  \
    }

VMP_TELL_LOOKS(relaxed_u16, uint16_t)
VMP_TELL_LOOKS(acquire_u16, uint16_t)
VMP_TELL_LOOKS(relaxed_u32, uint32_t)
VMP_TELL_LOOKS(relaxed_u64, uint64_t)

static inline void *vmp_fuzz_memcpy(void *to, const void *from, size_t size)
{
    memcpy(to, from, size);
    if (vmp_fuzz_looked && size)
        vmp_fuzz_looked(from, size);
    return to;
}

#define memcpy(to, from, size) vmp_fuzz_memcpy(to, from, size)

#endif
