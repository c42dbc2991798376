"""How a target tells libFuzzer that something did not hold: it prints what, and aborts."""

from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort


cdef inline int report(const char *wrong) noexcept nogil:
    if wrong is not NULL:
        fprintf(stderr, "== broken promise: %s\n", wrong)
        abort()
    return 0


cdef inline int report_exception(object error) noexcept:
    """The same for an exception that nothing documents."""
    import traceback

    traceback.print_exception(error)
    return report("an exception")
