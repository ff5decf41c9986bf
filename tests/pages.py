"""Pages of docs/ whose blocks are run: files, and commands in processes of their own."""

import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

from forked import forked, module

DOCS = Path(__file__).parents[1] / "docs"


class Page:
    """A page's blocks.

    Attributes:
        text: the page.
        blocks: (language, content) in order.
        files: the blocks that are files, by the name in their first line, or in the one after
            Hydra's package.
        commands: the other blocks in Python and bash.
    """

    def __init__(self, name: str) -> None:
        self.text = (DOCS / name).read_text(encoding="utf-8")
        self.blocks = re.findall(r"^```(\w+)\n(.*?)^```$", self.text, re.M | re.S)
        head = r"(?:# @package \S+\n)?# (\S+\.(?:py|yaml))\n"
        named = ((re.match(head, body), body) for _, body in self.blocks)
        self.files = {match[1]: body for match, body in named if match}
        self.commands = [
            (language, body)
            for language, body in self.blocks
            if language in ("bash", "python") and body not in self.files.values()
        ]

    def write(self, folder: Path) -> Path:
        """The page's files in a folder."""
        for name, body in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(body, encoding="utf-8")
        return folder


def run(language: str, body: str, folder: Path, timeout: int = 240) -> CompletedProcess:
    """One block in a process of its own; nothing of the environment but the interpreter's place.

    Our commands and Python run in a fork of this process; other lines of a shell in a shell.
    """
    quiet = {
        k: v for k, v in os.environ.items() if not k.startswith(("SURFLOW_", "WANDB_", "PYTHON"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{quiet.get('PATH', '')}"
    environment = {**quiet, "PATH": path, "OMP_NUM_THREADS": "1"}
    if language == "python":
        act = partial(exec, compile(body, "<page>", "exec"), {"__name__": "__main__"})
        return forked(act, folder, environment, timeout)
    lines = [shlex.split(line, comments=True) for line in body.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line]
    if all(line[:2] == ["python", "-m"] for line in lines):
        done = [CompletedProcess("", 0, "", "")]
        for _, _, name, *arguments in lines:
            done.append(forked(module(name, *arguments), folder, environment, timeout))
            if done[-1].returncode:
                break
        texts = ("".join(getattr(d, stream) for d in done) for stream in ("stdout", "stderr"))
        return CompletedProcess(body, done[-1].returncode, *texts)
    return subprocess.run(
        ["bash", "-e", "-c", body],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
