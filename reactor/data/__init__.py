"""A worker process: one reactor loop on one core, its disks and their connections."""
