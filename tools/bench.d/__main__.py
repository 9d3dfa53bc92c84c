"""Starts the command: an interrupt is no traceback, even while all else is imported."""

import sys

try:
    from command import main

    status = main()
except KeyboardInterrupt:
    status = 130
sys.exit(status)
