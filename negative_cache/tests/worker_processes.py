"""Runs a program as several worker processes of this machine, which `TF_CONFIG` makes a cluster."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import NamedTuple

NUM_WORKERS = 2
SECONDS_TO_RUN = 300


class Finished(NamedTuple):
    """How a worker ended, and what it printed."""

    returncode: int
    output: str

    def result(self):
        """The JSON of the last line."""
        return json.loads(self.output.splitlines()[-1])


def environment():
    """The variables of a process that imports the package under test."""
    # What an installation adds to `sys.path` is not in it yet when a new process starts.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run_workers(program, *arguments, folder, succeed=True):
    """Runs `python -m program arguments…` as `NUM_WORKERS` workers, and returns how they ended.

    Args:
      program: a module.
      *arguments: of the program.
      folder: where the output of the workers is written.
      succeed: whether all are to succeed. Otherwise at least one is to fail.
    """
    outputs = [pathlib.Path(folder) / f"output_of_worker_{i}" for i in range(NUM_WORKERS)]
    workers = [f"localhost:{port}" for port in _free_ports()]
    with contextlib.ExitStack() as stack:
        processes = []
        for i, output in enumerate(outputs):
            task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}
            process = subprocess.Popen(
                [sys.executable, "-m", program, *map(str, arguments)],
                env={**environment(), "TF_CONFIG": json.dumps(task), "CUDA_VISIBLE_DEVICES": ""},
                stdout=stack.enter_context(output.open("wb")),
                stderr=subprocess.STDOUT,
            )
            stack.callback(_kill, process)
            processes.append(process)
        end = time.monotonic() + SECONDS_TO_RUN
        is_late = False
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                is_late = True
    finished = [
        Finished(process.returncode, output.read_text(errors="replace"))
        for process, output in zip(processes, outputs)
    ]
    has_succeeded = not any(worker.returncode for worker in finished)
    report = "\n\n".join(
        f"worker {i} ended with {worker.returncode}:\n{worker.output[-8000:]}"
        for i, worker in enumerate(finished)
    )
    assert not is_late, f"The workers did not end in {SECONDS_TO_RUN} seconds.\n{report}"
    assert has_succeeded == succeed, report
    return finished


def _free_ports():
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(NUM_WORKERS)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def _kill(process):
    if process.poll() is None:
        process.kill()
        process.wait()
