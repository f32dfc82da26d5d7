"""`python -m snakemake_executor_plugin_submitit.inner -m snakemake ...`: the Snakemake that runs one rule inside a job.

It does not answer SIGTERM, where Snakemake itself would take a lock in its handler that the thread it interrupts may hold:
of two signals close together (SLURM's to every process of the job, and the job's own) the second one can hang it for good,
and the job's exit code with it. The rule's command gets the signal too and decides; this process only waits for its end.
"""

import os
import runpy
import signal
import sys


def keep_sigterm() -> None:
    """From now on SIGTERM does nothing in this process, whatever handler is asked for; its children are free."""
    set_handler, process = signal.signal, os.getpid()
    # Not SIG_IGN: a rule's programs would inherit it.
    set_handler(signal.SIGTERM, lambda *_: None)

    def set_other_handler(number, handler):
        kept = number == signal.SIGTERM and os.getpid() == process
        return signal.getsignal(number) if kept else set_handler(number, handler)

    signal.signal = set_other_handler


if __name__ == "__main__":
    keep_sigterm()
    sys.argv[:3] = sys.argv[2:3]  # as `python -m snakemake ...` would have it
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
