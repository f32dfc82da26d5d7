"""One command -> all ranks: `nanochat-launch [--gpus N] CMD...`, in front of a rule's command.

Which ranks there are is read from the allocation, so the same rule runs under any executor, or by hand:
- at most one GPU on one node: CMD replaces this process;
- several GPUs on a node: torchrun starts CMD once per GPU;
- several nodes: one torchrun per node, and they find each other at the first one. The plugin's jobs wait on every node for
  what to run; elsewhere srun starts it (but srun kills its ranks at SIGTERM, so a preemption then costs a checkpoint interval).
On CPUs there is one rank per node unless --ranks-per-node says otherwise.

The exit code is that of the rank that failed first, or that says why (exits.KINDS) where another one just lost its peer.
torchrun itself would answer SIGTERM by ending its ranks at once, and whatever happened exit 1; here a rank decides about both
signals by itself, since it may have a checkpoint to save.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from . import exits, slots

PEERS_SECONDS = 60.0  # for ranks whose peers are gone to save or to fail, and for another node to say why


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        _parser().error("CMD is missing: nanochat-launch nanochat base ...")
    nodes = arguments.nodes or int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    inside_node = os.environ.get("LAUNCH_NODE") == "1"
    if nodes > 1 and not inside_node:
        return _all_nodes(nodes, arguments, command)
    ranks = arguments.ranks_per_node or _gpus_here(arguments.gpus, nodes)
    if ranks <= 1 and nodes == 1:
        os.execvp(command[0], command)
    return _torchrun(ranks, nodes, command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanochat-launch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, help="GPUs of the whole job; refused where the allocation shows fewer.")
    parser.add_argument("--nodes", type=int, help="Nodes of the job. Default: those of the SLURM allocation, else 1.")
    parser.add_argument(
        "--ranks-per-node", type=int, help="Processes on each node. Default: one per GPU, at least one."
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD...", help="What each rank runs.")
    return parser


def _gpus_here(asked: int | None, nodes: int) -> int:
    """Ranks of this node. Ends the program when it shows fewer GPUs than `asked` over all nodes."""
    here = len(slots.visible_gpus())
    if asked is None:
        # Without an allocation that hands out GPUs, taking all of a shared machine's would be rude: one rank.
        return here if os.environ.get("SLURM_JOB_ID") and _allocated_gpus() else 1
    each = -(-asked // nodes)
    if here < each:
        print(
            f"nanochat-launch: --gpus {asked}: this node shows {here} GPUs, {each} are needed. "
            "Does the profile's global `resources: gpu` clip the rule's?",
            file=sys.stderr,
        )
        raise SystemExit(exits.WRONG_GPUS)
    return max(each, 1)


def _allocated_gpus() -> bool:
    return any(os.environ.get(name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"))


def _torchrun(ranks: int, nodes: int, command: list[str]) -> int:
    """Run `ranks` processes of `command` here, as one of `nodes`; returns the exit code of the first one that failed."""
    # Both go to every process of a job. Ignored here and, unless a rank handles them, in the ranks.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    # The CPUs of the allocation, not all of the node's.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if nodes == 1:
        where = ["--standalone"]
    else:
        where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={os.environ['LAUNCH_ENDPOINT']}"]
        where += [f"--rdzv-id={os.environ['LAUNCH_ID']}"]
        # Said, not guessed: torchrun guesses from the address, and where nodes share one, the second may take the first's port.
        where += [f"--rdzv-conf=is_host={str(_is_first_node()).lower()}"]
    options = [*where, f"--nnodes={nodes}", f"--nproc-per-node={ranks}", "--max-restarts=0", "--no-python"]
    options += ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]
    try:
        run.run(run.parse_args([*options, *command]))
    except ChildFailedError as error:
        # torchrun stamps them in whole seconds: who failed first is not always known.
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        return telling([failure.exitcode for failure in failures])
    return 0


def telling(codes: list[int]) -> int:
    """The first of these exit codes that says why, else the first one. In: as of subprocess, -n for signal n; out: 128 + n."""
    code = next((code for code in codes if code in exits.KINDS), codes[0])
    return 128 - code if code < 0 else code


def _is_first_node() -> bool:
    return os.environ.get("SLURM_NODEID", "0") == "0"


def _all_nodes(nodes: int, arguments: argparse.Namespace, command: list[str]) -> int:
    """Start this launcher again on every node, this one included."""
    restart = os.environ.get("SLURM_RESTART_COUNT") or "0"
    address = _address(os.environ.get("SLURMD_NODENAME") or os.uname().nodename)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    os.environ |= {"LAUNCH_NODE": "1", "LAUNCH_ENDPOINT": f"{address}:{port}"}
    os.environ |= {"LAUNCH_ID": f"{os.environ['SLURM_JOB_ID']}-{restart}"}
    inner = [sys.executable, "-m", "snakemake_executor_plugin_submitit.launch", f"--nodes={nodes}"]
    inner += [f"--gpus={arguments.gpus}"] if arguments.gpus else []
    inner += [f"--ranks-per-node={arguments.ranks_per_node}"] if arguments.ranks_per_node else []
    inner += ["--", *command]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ.get("LAUNCH_RANKS"):
        return _with_helpers(nodes, inner, Path(os.environ["LAUNCH_RANKS"]))
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=1"]
    if os.environ.get("SLURM_CPUS_PER_TASK"):  # since 22.05 srun does not inherit it
        step += [f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}"]
    return subprocess.run([*step, *inner]).returncode


def _with_helpers(nodes: int, inner: list[str], ranks: Path) -> int:
    """Let the jobs that wait on the other nodes run `inner` too; the exit code of the node that failed first, or says why."""
    exits.write_whole(ranks, json.dumps({"command": inner, "environment": dict(os.environ)}))
    here = subprocess.Popen(inner)
    others = [exits.node_exit_path(ranks, node) for node in range(1, nodes)]
    first: list[int] = []  # what was seen to fail before anything else
    until = float("inf")
    while True:
        codes = [here.poll(), *(int(path.read_text()) for path in others if path.exists())]
        failed = [code for code in codes if code]
        first = first or failed
        said_why = any(code in exits.KINDS for code in failed)
        if codes[0] is not None and (not failed or said_why or len(codes) == nodes):
            break
        if failed and until == float("inf"):
            until = time.time() + PEERS_SECONDS
        if (
            time.time() > until
        ):  # with their peers gone this node's ranks fail too, or save; those that wait for ever are ended
            here.kill()
            break
        time.sleep(0.5)
    return telling([*failed, *first]) if said_why else telling(first or [0])


def _address(node: str) -> str:
    """The network address of a node, which need not be its name."""
    shown = subprocess.run(["scontrol", "show", "node", "--oneliner", node], capture_output=True, text=True).stdout
    fields = dict(item.split("=", 1) for item in shown.split() if "=" in item)
    return fields.get("NodeAddr", node)


if __name__ == "__main__":
    sys.exit(main())
