"""Processes that begin with the host libraries imported: forked from one that has done so, which saves seconds each.

What those libraries read from the environment as they are imported is read by that first process. hf_pc is imported by
each for itself.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

LIBRARIES = ["accelerate", "datasets", "matplotlib.pyplot", "peft", "torch.distributed", "transformers.trainer",
             "transformers.models.gpt2.modeling_gpt2"]  # fmt: skip


class Started:
    """A process that a `Preloaded` has started."""

    def __init__(self, server: Preloaded, pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> int:
        self.returncode = self.server.ask({"wait": self.pid})
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Preloaded:
    """A process that has imported `LIBRARIES` and starts others that go on from there. Use as a context manager.

    Args:
        environment: what it imports them in.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        own = {**environment, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # the other has a thread, which forks would lose
        self._server = subprocess.Popen([sys.executable, __file__], env=own, **pipes)

    def __enter__(self) -> Preloaded:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def ask(self, order: Mapping[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that starts others has ended with {self._server.wait()}")
        return json.loads(answer)

    def start(self, *command: str, environment: Mapping[str, str], cwd: Path, out: Path, err: Path) -> Started:
        """Start `python command...`, a file or `-c code`, whose output goes to the files `out` and `err`."""
        given = {"command": command, "environment": dict(environment), "cwd": str(cwd), "files": [str(out), str(err)]}
        return Started(self, self.ask({"start": given}))

    def run(self, *command: str, environment: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """The same to its end, with what it printed."""
        with TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            code = self.start(*command, environment=environment, cwd=cwd, out=files[0], err=files[1]).wait()
            return subprocess.CompletedProcess(command, code, *[path.read_text() for path in files])


def _serve() -> dict[str, Any]:
    """Follow orders; returns in a process that was started by one, what it is to do."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed is no answer
    for name in LIBRARIES:
        __import__(name)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        ((verb, given),) = json.loads(line).items()
        answer: int | None
        if verb == "start":
            sys.stdout.flush()
            sys.stderr.flush()
            answer = os.fork()
            if not answer:
                return dict(given)
        else:
            if given not in ended:
                pid, status = os.waitpid(given, os.WNOHANG if verb == "poll" else 0)
                ended |= {pid: os.waitstatus_to_exitcode(status)} if pid else {}
            answer = ended.get(given)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)


def _become(command: list[str], environment: dict[str, str], cwd: str, files: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    code, *arguments = command[1:] if command[0] == "-c" else command
    np.random.seed()
    sys.argv = ["-c" if command[0] == "-c" else code, *arguments]
    first = "" if command[0] == "-c" else str(Path(code).resolve().parent)
    sys.path[0:1] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if command[0] == "-c":
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(code, run_name="__main__")


if __name__ == "__main__":
    _become(**_serve())
