/* atomics.h - every ordered access to memory that another process (or the guest) also uses.
 *
 * The only file with __atomic builtins. A name says the order it gives:
 *   vmp_load_relaxed_*    single access, no order          vmp_store_relaxed_*   single access, no order
 *   vmp_load_acquire_*    later accesses stay after it     vmp_store_release_*   earlier accesses stay before it
 *   vmp_fence_full        store-load fence: nothing crosses it (x86: a locked instruction or mfence)
 *   vmp_fence_own_death    order for those who come after a death of this thread; the compiler alone has to keep it
 *   vmp_exchange_full_*   read-modify-write, full order
 * Each use outside this file carries an ORDER comment; shm/ORDERING.md lists the pairs.
 * A relaxed access is still one access: the compiler may neither tear, repeat nor invent it,
 * which is what "copy a guest field once" needs.
 */
#ifndef VMP_ATOMICS_H
#define VMP_ATOMICS_H

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Behind a read-modify-write that is to be a full fence. C11 keeps a later relaxed access behind its load alone, and
 * ARM's LDAXR and STLXR do no more; a locked instruction of x86 is a full fence by itself. */
static inline void vmp_fence_behind(void)
{
#if !defined(__x86_64__)
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

#define VMP_DEFINE_ACCESS(width, type)                                                                             \
    static inline type vmp_load_relaxed_##width(const type *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }    \
    static inline type vmp_load_acquire_##width(const type *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }    \
    static inline void vmp_store_relaxed_##width(type *p, type v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }    \
    static inline void vmp_store_release_##width(type *p, type v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }    \
    static inline type vmp_exchange_full_##width(type *p, type v)                                                  \
    {                                                                                                              \
        type before = __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                 \
        vmp_fence_behind();                                                                                        \
        return before;                                                                                             \
    }

VMP_DEFINE_ACCESS(u8, uint8_t)
VMP_DEFINE_ACCESS(u16, uint16_t)
VMP_DEFINE_ACCESS(u32, uint32_t)
VMP_DEFINE_ACCESS(u64, uint64_t)

/* Single-writer counter: the owner adds, anybody reads. No order: a counter publishes nothing. */
#ifdef VMP_NO_COUNTERS /* build.h */
static inline void vmp_count_u64(uint64_t *p, uint64_t n) { (void)p, (void)n; }
#else
static inline void vmp_count_u64(uint64_t *p, uint64_t n) { __atomic_store_n(p, *p + n, __ATOMIC_RELAXED); }
#endif

/* Counter with several writers. */
static inline uint32_t vmp_fetch_add_full_u32(uint32_t *p, uint32_t n)
{
    uint32_t before = __atomic_fetch_add(p, n, __ATOMIC_SEQ_CST);
    vmp_fence_behind();
    return before;
}

/* Atomic OR, for the dirty log: the front-end clears bits while we set them. */
static inline void vmp_or_full_u8(uint8_t *p, uint8_t bits)
{
    (void)__atomic_fetch_or(p, bits, __ATOMIC_SEQ_CST);
    vmp_fence_behind();
}

static inline void vmp_fence_full(void)
{
#if defined(__x86_64__)
    /* A locked read-modify-write of the stack orders stores before loads as mfence does, at a third of the cost. */
    __asm__ __volatile__("lock; orl $0,-128(%%rsp)" ::: "memory", "cc");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* Keeps what precedes before what follows for whoever looks at it after this very thread was killed: that is the
 * compiler's to do, a processor ends a thread between two instructions and loses none of its stores. No instruction. */
static inline void vmp_fence_own_death(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

static inline void vmp_cpu_relax(void)
{
#if defined(__x86_64__)
    __asm__ __volatile__("pause" ::: "memory");
#elif defined(__aarch64__)
    __asm__ __volatile__("yield" ::: "memory");
#else
    __asm__ __volatile__("" ::: "memory");
#endif
}

static inline void vmp_prefetch_read(const void *p) { __builtin_prefetch(p, 0, 3); }
#if defined(__x86_64__)
/* By hand: compiled for any x86-64, the builtin is a prefetch to read, and the first store then waits for the line a
 * second time. Processors that do not know the instruction take it for a no-op. */
static inline void vmp_prefetch_write(const void *p) { __asm__ volatile("prefetchw %0" : : "m"(*(const char *)p)); }
#else
static inline void vmp_prefetch_write(const void *p) { __builtin_prefetch(p, 1, 3); }
#endif

static inline uint64_t vmp_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Sleep while *p == expected, for at most timeout_ns. Shared between processes. 0 or -errno;
 * 0, -EAGAIN and -EINTR all mean: look again (a futex may wake for nothing). */
static inline int vmp_futex_wait(uint32_t *p, uint32_t expected, uint64_t timeout_ns)
{
    struct timespec t = {.tv_sec = (time_t)(timeout_ns / 1000000000u), .tv_nsec = (long)(timeout_ns % 1000000000u)};
    return syscall(SYS_futex, p, FUTEX_WAIT, expected, &t, NULL, 0) == 0 ? 0 : -errno;
}

/* One of the words that vmp_futex_wait_any sleeps on: struct futex_waitv of Linux 5.16, which older headers lack. */
struct vmp_futex_waiter {
    uint64_t expected;
    uint64_t word;
    uint32_t flags;
    uint32_t reserved;
};
#define VMP_FUTEX_U32 2u
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

/* Sleep while each of n words, shared between processes, is as expected. 0 or -errno; -ENOSYS: the kernel has no such
 * call. Else as vmp_futex_wait: look again. */
static inline int vmp_futex_wait_any(struct vmp_futex_waiter *waiters, unsigned n)
{
    return syscall(SYS_futex_waitv, waiters, n, 0, NULL, 0) >= 0 ? 0 : -errno;
}

static inline void vmp_futex_wake_all(uint32_t *p) { (void)syscall(SYS_futex, p, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

#endif
