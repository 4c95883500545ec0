"""`python -m fnrl`: the command line."""

import sys

from fnrl.cli import main

sys.exit(main())
