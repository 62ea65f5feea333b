"""What another operating-system user may read, found by becoming that user in a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quorate.client.node.users import SystemUser


@dataclass(frozen=True)
class Access:
    """Questions about one user; only root may ask them."""

    account: SystemUser

    def reads(self, paths: Sequence[Path]) -> list[bool]:
        """Return for each file whether the user may read it; for each folder, whether it may list it."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                self._become()
                answer = json.dumps([_opens(path) for path in paths]).encode()
                with os.fdopen(writing, "wb") as stream:
                    stream.write(answer)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            content = stream.read()
        os.waitpid(child, 0)
        answers: list[bool] = json.loads(content)
        return answers

    def reads_tree(self, path: Path) -> list[bool]:
        """Return the same for a file, or for every file in a folder."""
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        return self.reads(files)

    def _become(self) -> None:
        os.setgroups([])
        os.setresgid(self.account.gid, self.account.gid, self.account.gid)
        os.setresuid(self.account.uid, self.account.uid, self.account.uid)


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return False
    return True
