"""What is shipped: layout, declared dependencies, a light command line, and a wheel that works elsewhere."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheels import build_wheel, install_wheel

ROOT = Path(__file__).resolve().parents[1]
PORTIONS = ("deploy", "server", "client", "shared", "simulations")
OFFLINE = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}


def run(*command: str | Path, cwd: Path) -> str:
    """Run outside the repository's influence and return stdout; fail with everything that was printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=inherited | OFFLINE, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def declared() -> list[Requirement]:
    """Everything pyproject.toml may install, without the extras that name quorate itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    requirements = [Requirement(line) for line in project["dependencies"] + extras]
    return [requirement for requirement in requirements if requirement.name != "quorate"]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("portion", PORTIONS)
def test_each_portion_is_typed_and_shares_the_namespace(portion: str) -> None:
    namespace = ROOT / portion / "quorate"
    assert (namespace / portion / "__init__.py").is_file()
    assert (namespace / portion / "py.typed").is_file()
    # This one file would hide the other four portions.
    assert not (namespace / "__init__.py").exists()


def test_constraints_are_exact() -> None:
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"{pin} is no exact pin"
        assert "+" not in specifier.version, f"{pin} fits one build only"
    names = [canonicalize_name(pin.name) for pin in pins()]
    assert len(names) == len(set(names))
    assert names[0] == "torch"
    assert "torchvision" not in names


def test_constraints_cover_what_is_declared() -> None:
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins()}
    for requirement in declared():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt lacks {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_help_loads_no_heavy_library(tmp_path: Path) -> None:
    program = """
import json, sys
from quorate.deploy.cli import main
sys.argv = ["quorate", "--help"]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
print()
heavy = {"torch", "transformers", "flwr", "scipy", "dp_accounting", "opacus"}
print(json.dumps([code, sorted(heavy & sys.modules.keys())]))
"""
    printed = run(sys.executable, "-c", program, cwd=tmp_path).splitlines()
    assert json.loads(printed[-1]) == [0, []]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, and the present one's packages behind it; returns its folder."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    install_wheel(wheel, home, Path(pytest.__file__).parents[1])
    return home


@pytest.mark.slow
def test_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"quorate/{path.relative_to(ROOT / portion / 'quorate').as_posix()}"
        for portion in PORTIONS
        for path in (ROOT / portion / "quorate").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = (path for path in (ROOT / "simulations" / "recipes").rglob("*") if path.is_file())
    expected |= {f"quorate/{path.relative_to(ROOT).as_posix()}" for path in recipes}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_installed_wheel_is_the_copy_in_use(installed: Path) -> None:
    modules = ", ".join(f"quorate.{portion}" for portion in PORTIONS)
    program = f"""
import json, sys
import {modules}
files = [module.__file__ for name, module in sys.modules.items() if name.startswith("quorate.")]
print(json.dumps([files, sys.path]))
"""
    files, path = json.loads(run(installed / "bin" / "python", "-c", program, cwd=installed))
    assert len(files) >= len(PORTIONS)
    assert all(Path(file).is_relative_to(installed) for file in files), files
    assert not {str(ROOT), *(str(ROOT / portion) for portion in PORTIONS)} & set(path), path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_installed_wheel_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    quorate = installed / "bin" / "quorate"
    run(quorate, "validate", "demo", cwd=tmp_path)
    run(quorate, "simulate", "demo", "federation.rounds=1", "training.max_steps=1", "-o", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "report.html").is_file()
