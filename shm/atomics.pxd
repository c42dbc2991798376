"""Cython's view of atomics.h. Orders are named, never passed; see the header for what each gives."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "atomics.h" nogil:
    uint8_t vmp_load_relaxed_u8(const uint8_t *p)
    uint16_t vmp_load_relaxed_u16(const uint16_t *p)
    uint32_t vmp_load_relaxed_u32(const uint32_t *p)
    uint64_t vmp_load_relaxed_u64(const uint64_t *p)
    uint16_t vmp_load_acquire_u16(const uint16_t *p)
    uint32_t vmp_load_acquire_u32(const uint32_t *p)
    uint64_t vmp_load_acquire_u64(const uint64_t *p)
    void vmp_store_relaxed_u16(uint16_t *p, uint16_t v)
    void vmp_store_relaxed_u32(uint32_t *p, uint32_t v)
    void vmp_store_relaxed_u64(uint64_t *p, uint64_t v)
    void vmp_store_release_u16(uint16_t *p, uint16_t v)
    void vmp_store_release_u32(uint32_t *p, uint32_t v)
    void vmp_store_release_u64(uint64_t *p, uint64_t v)
    uint32_t vmp_exchange_full_u32(uint32_t *p, uint32_t v)
    uint32_t vmp_fetch_add_full_u32(uint32_t *p, uint32_t n)
    void vmp_or_full_u8(uint8_t *p, uint8_t bits)
    void vmp_count_u64(uint64_t *p, uint64_t n)
    void vmp_fence_full()
    void vmp_fence_own_death()
    void vmp_cpu_relax()
    void vmp_prefetch_read(const void *p)
    void vmp_prefetch_write(const void *p)
    uint64_t vmp_now_ns()
    struct vmp_futex_waiter:
        uint64_t expected
        uint64_t word
        uint32_t flags
        uint32_t reserved
    uint32_t VMP_FUTEX_U32
    int vmp_futex_wait_any(vmp_futex_waiter *waiters, unsigned n)
    int vmp_futex_wait(uint32_t *p, uint32_t expected, uint64_t timeout_ns)
    void vmp_futex_wake_all(uint32_t *p)
