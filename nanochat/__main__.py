"""`python -m nanochat`, the same as `nanochat`."""

import sys

from nanochat.cli import main

sys.exit(main())
