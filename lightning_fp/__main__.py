"""`python -m lightning_fp`: the command line where its script is not on the path."""

import sys

from lightning_fp.cli import main

sys.exit(main())
