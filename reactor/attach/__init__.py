"""Attaching disks to the kernel's /dev/nbdN; every call here may block."""
