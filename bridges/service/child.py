"""A job's first process: dies with its worker, holds the run folder's lock, and becomes the launcher.

    python -m bridges.service.child LOCK PARENT -- accelerate launch recipes/train.py ...

The lock is inherited over exec and held as long as the launcher lives, so that a worker which was stopped
for longer than its lease cannot start a job beside another's. Linux sends SIGKILL when the parent dies;
elsewhere the next worker finds what is left by the mark in its environment.
"""

import ctypes
import fcntl
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
WAIT = 20.0  # seconds; what holds the lock has been killed before
BUSY = 76  # exit code: another job works on this run folder


def main() -> None:
    lock_path, parent, _, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > deadline:
                sys.stderr.write("error: another process works on this run folder\n")
                sys.exit(BUSY)
            time.sleep(0.1)
    os.set_inheritable(lock, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
