"""The process between us and an untrusted program; `sandbox.py` starts it as a script, with the standard library alone."""

import contextlib
import ctypes
import json
import math
import os
import re
import resource
import shutil  # noqa: F401 the program finds it as we leave it
import signal
import sys
import time

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
CLONE_NEWNS = 0x00020000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 36, 4, 38
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
# Options that a mount keeps when it is remounted; without privilege they may not be dropped.
KEPT_OPTIONS = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}
# Where the file system cannot be made read-only, what destroys the most is taken from the program.
DESTRUCTIVE = {
    "os": "chmod chown kill killpg link lchown remove removedirs rename renames replace rmdir symlink truncate unlink",
    "shutil": "chown copytree move rmtree",
}


def main() -> None:
    order = json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what the program leaves behind becomes our child
    isolated = isolate(libc)
    read_end, write_end = os.pipe()
    deadline = time.monotonic() + order["seconds"]
    program = os.fork()
    if program == 0:
        os.close(read_end)
        with contextlib.suppress(BaseException):
            run(order, write_end, libc, isolated)
        os._exit(1)
    os.close(write_end)
    status, detail = wait(program, deadline)
    kill_children()
    # Read after everything that could hold the pipe is dead; a report is at most a pipe's worth.
    os.set_blocking(read_end, False)
    report = {}
    with contextlib.suppress(OSError, ValueError):
        report = json.loads(os.read(read_end, 65536))
    if not isinstance(report, dict):
        report = {}
    if status == "ended":
        detail = str(report.get("detail", "ended before its end"))[:300]
    answer = {"status": status, "detail": detail, "word": report.get("word"), "isolated": isolated}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()


def isolate(libc: ctypes.CDLL) -> list[str]:
    """Leave the network, the process table and all files but our folder; without privilege through a user namespace. What succeeded."""
    user, group = os.getuid(), os.getgid()
    done = []
    for flags, name in ((CLONE_NEWNET | CLONE_NEWIPC, "network"), (CLONE_NEWPID, "processes")):
        entered = libc.unshare(flags) == 0
        if not entered and not done and libc.unshare(CLONE_NEWUSER | flags) == 0:
            entered = True
            # Keep the numbers of user and group, so that files are still ours.
            with contextlib.suppress(OSError):
                write("/proc/self/setgroups", "deny")
                write("/proc/self/uid_map", f"{user} {user} 1")
                write("/proc/self/gid_map", f"{group} {group} 1")
        if entered:
            done.append(name)
    if libc.unshare(CLONE_NEWNS) == 0 and make_read_only(libc, os.getcwd()):
        done.append("files")
    return done


def make_read_only(libc: ctypes.CDLL, folder: str) -> bool:
    """In a mount namespace of our own: nothing can be written any more but below `folder`. False where a mount resists."""

    def mount(source: str | None, target: str, flags: int) -> bool:
        return libc.mount(source and source.encode(), os.fsencode(target), None, flags, None) == 0

    if not mount(None, "/", MS_REC | MS_PRIVATE) or not mount(folder, folder, MS_BIND):
        return False
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [line.split() for line in file]
    done = True
    for fields in mounts:
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
        options = fields[5].split(",")
        if point == folder or "ro" in options:
            continue
        flags = sum(KEPT_OPTIONS.get(option, 0) for option in options)
        # A mount that another one hides cannot be reached, neither by us nor by the program.
        done = (mount(None, point, MS_REMOUNT | MS_BIND | MS_RDONLY | flags) or not os.access(point, os.W_OK)) and done
    os.chdir(folder)  # where we are is still the folder below the new mount
    return done


def drop_privileges(libc: ctypes.CDLL) -> None:
    """Leave no capability, so that what the namespaces keep out cannot be undone from within."""
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())


def run(order: dict, report_to: int, libc: ctypes.CDLL, isolated: list[str]) -> None:
    """In the child: set the limits, run the program, write the word when it came to its end."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.setpgid(0, 0)  # a signal to its own group does not reach us
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    cpu = math.ceil(order["seconds"])
    for name, limit in (
        (resource.RLIMIT_CPU, cpu + 1),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, order["open_files"]),
        (resource.RLIMIT_NPROC, order["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(name, (limit, limit))
    if "files" in isolated:
        drop_privileges(libc)
    else:
        for module, names in DESTRUCTIVE.items():
            for name in names.split():
                setattr(sys.modules[module], name, None)
    word = order["word"]
    source = order["program"]
    order.clear()
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
        report = {"word": word, "detail": ""}
    except BaseException as error:
        try:
            report = {"detail": f"{type(error).__name__}: {error}"[:300]}
        except BaseException:
            report = {"detail": type(error).__name__}
    os.write(report_to, json.dumps(report).encode())
    os._exit(0)


def wait(program: int, deadline: float) -> tuple[str, str]:
    """How the program ended; killed at the deadline."""
    pause = 0.001
    while time.monotonic() < deadline:
        pid, status = os.waitpid(program, os.WNOHANG)
        if pid:
            if os.WIFSIGNALED(status):
                number = os.WTERMSIG(status)
                kind = "timed_out" if number == signal.SIGXCPU else "killed"
                return kind, signal.Signals(number).name
            return "ended", ""
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    return "timed_out", "wall clock"


def kill_children() -> None:
    """Kill and reap until none is left; a killed child's own children become ours and are next."""
    for _ in range(1000):
        children: list[int] = []
        with contextlib.suppress(OSError, ValueError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(pid) for pid in file.read().split()]
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
