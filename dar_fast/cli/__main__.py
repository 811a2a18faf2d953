"""`python -m dar_fast.cli`: `dar` where the script is not installed."""

import sys

from dar_fast.cli import main

sys.exit(main())
