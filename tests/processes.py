"""Start training scripts in processes of their own, forked from one that has imported them."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train_dit", "train_adapter", "torch._dynamo"])
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # where the preloading process finds them


def enter(script: str, words: list[str], environment: dict, log: str, before) -> None:
    """Be `python script.py words`, with all that it prints in a file."""
    import importlib

    import torch

    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as without us
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *words]
    module = importlib.import_module(script)
    if before is not None:
        before(module)
    module.data.run_cli(module.main)


def start(script: str, words, log: Path, world: int = 1, before=None) -> list:
    """Start `world` processes of a script, as torchrun does; `before(module)` runs in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world}
        environment |= {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        values = {name: str(value) for name, value in environment.items()}
        arguments = (script, [str(word) for word in words], values, str(log), before)
        processes.append(CONTEXT.Process(target=enter, args=arguments))
        processes[-1].start()
    return processes


def finish(processes: list, log: Path) -> str:
    """Wait for the processes, which must succeed; return what they printed."""
    for process in processes:
        process.join(timeout=240)
    text = log.read_text()
    assert [process.exitcode for process in processes] == [0] * len(processes), text
    return text


def torchrun(script: str, words, log) -> subprocess.Popen:
    """Start two processes of a script as the README does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = Path(__file__).parents[1]
    command += [str(root / f"{script}.py"), *map(str, words)]
    return subprocess.Popen(
        command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
