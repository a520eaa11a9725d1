"""One process that has imported everything and forks a training run whenever it is told to.

Lines in: the arguments of recipes/train.py as JSON. Lines out: the child's process id, then its exit status
when it has ended. So a test can kill twenty runs in the time that starting them would take.
"""

import json
import os
import sys

import torch

from recipes import train  # imported here, once


def main() -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.argv = ["train.py", *json.loads(line)]
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            torch.set_num_threads = lambda count: None
            try:
                train.run_recipe(train.main, train.TrainConfig, None)
            except SystemExit as stopped:
                os._exit(stopped.code or 0)
            os._exit(0)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
