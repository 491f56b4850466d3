"""`python -m medvit.cli NAME ...`."""

import sys

from medvit.cli import main

sys.exit(main())
