"""Backend identifiers: under which the kernel holds the devices of the disks."""

from __future__ import annotations

from reactor.spec import DiskSpec


def prefix(instance: str) -> str:
    """Return what the tags of all devices of the service begin with."""
    return f"nbd-reactor:{instance}:"


def tag(instance: str, spec: DiskSpec) -> str:
    """Return the tag of the disk's device.

    It names the storage too: a device is never taken over with another below it, of which a file
    system that is mounted on it knows nothing.
    """
    return f"{prefix(instance)}{spec.identity()}:{spec.name}"


def disk(tag: str) -> str:
    """Return the name of the disk whose tag it is."""
    return tag.rpartition(":")[2]
