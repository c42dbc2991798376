/* engine.c - libFuzzer as a library that is preloaded into Python (tests/fuzz/one.py).
 *
 * It is linked with libFuzzer's own main loop, so LLVMFuzzerRunDriver is called from Python; and it is preloaded, so
 * that the instrumented extension modules find libFuzzer's counters. What is here is what both sides need to name.
 */
#include <stddef.h>
#include <stdint.h>

/* Called after each look at shared memory (looks.h), if a target has set it. */
void (*vmp_fuzz_looked)(const void *at, size_t size);

/* Coverage of lines of Python, which a target counts itself (_requests.pyx); libFuzzer finds it by its section. */
__attribute__((section("__libfuzzer_extra_counters"))) uint8_t vmp_fuzz_lines[4096];
