"""A command in a fork of this process: isolated from it, without importing torch anew."""

import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import NoReturn


def forked(
    act: Callable[[], None], folder: Path, environment: Mapping[str, str], timeout: int = 240
) -> CompletedProcess:
    """Call ``act`` in a child process, in a folder; its exit code and both of its streams.

    The modules that this process has loaded are there; what the child changes is not seen here.
    After ``timeout`` seconds the child is ended by SIGALRM.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _be_the_child(act, folder, environment, timeout, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    return CompletedProcess(str(act), code, *texts)


def module(name: str, *arguments: str) -> Callable[[], None]:
    """``python -m name arguments``."""

    def act() -> None:
        sys.argv = [name, *arguments]
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return act


def _be_the_child(
    act: Callable[[], None],
    folder: Path,
    environment: Mapping[str, str],
    timeout: int,
    out: int,
    err: int,
) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(timeout)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path.insert(0, "")
        act()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
