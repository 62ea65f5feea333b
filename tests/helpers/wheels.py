"""Wheels of this checkout, and environments that hold nothing else of Quorate."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path


def build_wheel(project: Path, out: Path) -> Path:
    """Build the wheel of a project folder; returns its file."""
    _run(out, sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, project)
    (built,) = out.glob("*.whl")
    return built


def install_wheel(wheel: Path, home: Path, packages: Path) -> None:
    """Make a virtual environment with the wheel in it, and the folder `packages` behind it."""
    venv.create(home, with_pip=False, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check")
    _run(home, *pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # Only now, or pip would take our own editable install for an earlier one to remove. A folder named in a
    # .pth file is searched, but the .pth files in it are not read, so the checkout stays out of reach.
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(f"{packages}\n")


def _run(cwd: Path, *command: object) -> None:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
