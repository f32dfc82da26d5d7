"""One trainer for base, mid and sft; its checkpoints, ranks, signals and batch-size plans."""

import os

# Read when torch loads OpenMP, hence here. By default threads spin at a barrier for long; where a core is shared with another job
# they hold up the very thread they wait for. Measured on 2 cores, tokens/s of the local profile's model, alone / with both cores
# busy otherwise: default 18,500 / 900, this 16,500 / 5,000, no spinning at all 10,000 to 12,700 / 5,000.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
