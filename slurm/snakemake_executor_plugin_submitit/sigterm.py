"""Snakemake's answer to SIGTERM, made safe.

Its handler takes locks that the thread which it interrupts may hold: of two signals close together (SLURM's to every process of
a job, and the job's own), or of one at a bad moment, Snakemake can hang for good, and with it the exit code of a job.

In the driver the same handler runs in a thread of its own. Inside a job, where
`python -m snakemake_executor_plugin_submitit.sigterm -m snakemake ...` runs one rule, nothing answers: the rule's command gets the
signal too and decides, and Snakemake only waits for its end. A command that succeeds nevertheless has succeeded, where Snakemake
would end with 1.
"""

import functools
import os
import runpy
import signal
import sys
import threading


@functools.cache
def answer_in_a_thread() -> None:
    """Let a thread run the handler that SIGTERM has when this is called first."""
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler):
        return
    heard, hear = os.pipe()

    def answer() -> None:
        while os.read(heard, 1):
            handler(signal.SIGTERM, None)

    threading.Thread(target=answer, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: os.write(hear, b"."))


def do_not_answer() -> None:
    """From now on SIGTERM does nothing in this process, whatever handler is asked for; its children are free."""
    set_handler, process = signal.signal, os.getpid()
    # Not SIG_IGN: a rule's programs would inherit it.
    set_handler(signal.SIGTERM, lambda *_: None)

    def set_other_handler(number, handler):
        kept = number == signal.SIGTERM and os.getpid() == process
        return signal.getsignal(number) if kept else set_handler(number, handler)

    signal.signal = set_other_handler


if __name__ == "__main__":
    do_not_answer()
    sys.argv[:3] = sys.argv[2:3]  # as `python -m snakemake ...` would have it
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
