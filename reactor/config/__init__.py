"""disks.yaml: read with every problem found at once, and written back."""

from reactor.config.disk import parse_disk
from reactor.config.document import dump
from reactor.config.load import load
from reactor.errors import ConfigError

__all__ = ["ConfigError", "dump", "load", "parse_disk"]
