"""The kernel as oracle: the same cases on Linux's vhost-net and on ours, in a guest, held against each other."""
