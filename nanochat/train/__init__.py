"""One trainer for base, mid and sft; its checkpoints, ranks, signals and batch-size plans."""

import os

# Read when torch loads OpenMP, hence here. Where a core is shared with another job, threads that spin at a barrier hold up the very
# thread they wait for: 900 against 4,900 tokens/s on two busy cores. Alone on the machine both are equally fast.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
