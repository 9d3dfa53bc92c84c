"""`python -m reactor` is `nbd-reactor`."""

import sys

from reactor.cli import main

sys.exit(main())
