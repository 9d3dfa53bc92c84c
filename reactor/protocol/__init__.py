"""The NBD protocol without I/O: no socket, no clock."""
