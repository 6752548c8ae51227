"""`python -m jel` is the `jel` command."""

import sys

from jel.cli import main

sys.exit(main())
