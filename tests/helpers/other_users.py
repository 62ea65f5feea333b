"""A Python for users other than the one who runs the tests, whose own may lie in a home of his."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from quorate.client.node.users import SystemUser, reads


def interpreter(folder: Path, users: tuple[SystemUser, SystemUser]) -> str | None:
    """A Python that other users may run, with the libraries of this one; None where there is none.

    Args:
        folder: a virtual environment is made there; those users must be able to walk to it.
        users: who shall run it.
    """
    libraries = [path for path in sys.path if path and Path(path).is_dir() and "lib-dynload" not in path]
    libraries = [path for path in libraries if not Path(path, "os.py").exists()]
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        needed = [Path(python).resolve(), *map(Path, libraries)]
        if Path(python).exists() and all(all(reads(user, needed)) for user in users):
            made = subprocess.run([python, "-m", "venv", "--without-pip", folder], capture_output=True)
            if made.returncode == 0:
                (packages,) = folder.glob("lib/python*/site-packages")
                (packages / "these.pth").write_text("\n".join(libraries) + "\n")
                return str(folder / "bin" / "python")
    return None
