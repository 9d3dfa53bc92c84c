"""nbd-reactor: storage backends as Linux block devices, one reactor per CPU core."""

__version__ = "0.1.0"
