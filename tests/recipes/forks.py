"""One process that has imported everything and forks a run, on one process or several, when it is told to.

    with Forks() as forks:
        forks.run("recipes.train", arguments, processes=2)

To import torch and transformers takes longer than most runs of the tests do: so a test can kill twenty runs,
or start pairs of processes in five ways, in the time that starting them anew would take. What a user types
(`accelerate launch`, a recipe's own process) is run as typed by tests of its own.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

import torch

from tests.conftest import ROOT

MODULES = ("recipes.train", "recipes.extract", "tests.recipes.worker")


class Forks:
    """The parent's side: `run` starts a module's main on some processes and returns how they ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.recipes.forks"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def run(
        self,
        module: str,
        arguments: Sequence[object],
        *,
        processes: int = 1,
        stop: Callable[[], None] | None = None,
        by: int = signal.SIGKILL,
    ) -> int:
        """Start a run, signal it when `stop` returns, return the wait status: the first that is not zero.

        Raises:
            AssertionError: a run of several processes that failed, with what it said.
        """
        with tempfile.NamedTemporaryFile(mode="r") as said:
            order = {"module": module, "arguments": list(map(str, arguments)), "said": said.name}
            self.process.stdin.write(json.dumps(order | {"processes": processes}) + "\n")
            self.process.stdin.flush()
            children = json.loads(self.process.stdout.readline())
            if stop is not None:
                stop()
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, by)
            status = next(filter(None, json.loads(self.process.stdout.readline())), 0)
            assert status == 0 or processes == 1, (order, said.read()[-2000:])
        return status


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def main() -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        order, port = json.loads(line), free_port()
        children = [start(order, rank, port) for rank in range(order["processes"])]
        tell(children)
        tell([os.waitpid(child, 0)[1] for child in children])


def tell(numbers: list[int]) -> None:
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()


def start(order: dict, rank: int, port: int) -> int:
    """Fork; in the child, run the module as a launcher's process of this rank would."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        said = os.open(order["said"], os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads = lambda count: None
        if order["processes"] > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["processes"]}
            ranks |= {"LOCAL_WORLD_SIZE": order["processes"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ["ACCELERATE_USE_CPU"] = "true"
        sys.argv = [order["module"], *order["arguments"]]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
