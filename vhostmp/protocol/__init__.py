"""The vhost-user protocol without I/O: wire structures, an incremental decoder, what is legal when."""
