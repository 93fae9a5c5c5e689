"""`python -m vla_edge.cli` is `vla-edge`."""

import sys

from vla_edge.cli import main

sys.exit(main())
