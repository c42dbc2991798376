"""Signals to eventfds of the front-end's."""

cdef void signal_eventfd(int fd) noexcept nogil
