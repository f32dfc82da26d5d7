"""A training as the plugin sees it: steps, progress lines, checkpoints, both signals, the token of its attempt.

trainer.py FOLDER STEPS [SECONDS_PER_STEP]: the state is one number that depends on every step taken, so a lost or repeated step shows in
the curve. Exit codes are those of the contract: 85 checkpointed, 88 no longer the newest attempt.
"""

import os
import signal
import sys
import time
from pathlib import Path

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
pace = float(sys.argv[3]) if len(sys.argv) > 3 else 0.5
every = int(os.environ.get("CHECKPOINT_EVERY", "10"))
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda received, _: asked.append(received))


def save(step: int, state: float) -> None:
    token_file = os.environ.get("ATTEMPT_TOKEN_FILE")
    if token_file and Path(token_file).read_text() != os.environ["ATTEMPT_TOKEN"]:
        print(f"{folder.name}  a newer attempt than {os.environ['ATTEMPT_TOKEN']} runs: ending", flush=True)
        sys.exit(88)
    temporary = folder / f"checkpoint.{os.uname().nodename}.{os.getpid()}"
    temporary.write_text(f"{step} {state!r}")
    os.replace(temporary, folder / "checkpoint")


folder.mkdir(parents=True, exist_ok=True)
step, state = 0, 1.0
if (folder / "checkpoint").exists():
    first, second = (folder / "checkpoint").read_text().split()
    step, state = int(first), float(second)
name = folder.name
print(f"{name}  starts at step {step}, {os.environ.get('ATTEMPT_REASON', 'first')}", flush=True)
while step < steps:
    time.sleep(pace)
    state = state * 0.97 + step * 0.001
    step += 1
    with open(folder / "curve", "a") as curve:
        curve.write(f"{step} {state!r} {os.environ.get('SLURM_RESTART_COUNT', 0)}\n")
    print(f"{name}  step {step}/{steps}  loss {state:.4f}", flush=True)
    if asked:
        save(step, state)
        print(f"{name}  checkpointed at step {step} after signal {asked[0]}", flush=True)
        sys.exit(85)
    if step % every == 0:
        save(step, state)
save(step, state)
