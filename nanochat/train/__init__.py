"""One trainer for base, mid and sft; its checkpoints, ranks, signals and batch-size plans."""
