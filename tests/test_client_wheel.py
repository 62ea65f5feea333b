"""The wheel for sites: closed under its own imports, its requirements, and works where it is alone."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheels import build_wheel, install_wheel

from quorate.deploy.cli import app as full
from quorate.deploy.program import WHEELS, refuse_both_wheels
from quorate.deploy.site_cli import app as small
from quorate.shared.errors import BadInput
from quorate.shared.protocol.versions import QUORATE

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "client-wheel"
BROUGHT_ALONG = {"huggingface_hub": "transformers", "pydantic_core": "pydantic", "httpx": "flwr"}
"""Modules we import of packages that one of ours needs itself, and which."""
RUN = """
name: trial
task: {name: sequence_classification, labels: [yes, no]}
data: notes
model: {model_name_or_path: nowhere}
federation: {rounds: 3, quorum: 2}
"""


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def shipped() -> dict[str, Path]:
    """What the wheel is to hold: name in it -> file in the checkout."""
    found = {}
    wheel = project(FOLDER)["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in wheel["force-include"].items():
        path = (FOLDER / source).resolve()
        assert path.exists(), f"there is no {source}"
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in inside:
            if file.is_file() and "__pycache__" not in file.parts:
                below = file.relative_to(path).as_posix() if path.is_dir() else ""
                found[f"{target}/{below}".rstrip("/")] = file
    return found


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports when it runs, at its top or later; not those for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = [
        (node.lineno, node.body[-1].end_lineno or 0)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or any(
            first <= node.lineno <= last for first, last in for_types
        ):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif (node.module or "").startswith("quorate"):
            # `from quorate.deploy import program` imports a module, `from ...program import run` does not.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield node.module or ""


def test_it_imports_nothing_that_it_does_not_hold() -> None:
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
        for name, file in shipped().items()
        if name.endswith(".py")
    }
    missing = [
        f"{module} imports {name}"
        for module, file in modules.items()
        for name in imported(file)
        if name.split(".")[0] == "quorate" and not {name, name.rpartition(".")[0]} & modules.keys()
    ]
    assert not missing, "add the file to deploy/client-wheel/pyproject.toml, or import less"


def test_what_it_imports_is_required() -> None:
    declared = {canonicalize_name(each.name) for each in requirements(FOLDER)}
    known = packages_distributions()
    undeclared = set()
    for name, file in shipped().items():
        for module in imported(file) if name.endswith(".py") else ():
            top = BROUGHT_ALONG.get(module.split(".")[0], module.split(".")[0])
            if top in sys.stdlib_module_names or top == "quorate":
                continue
            if not {canonicalize_name(each) for each in known.get(top, [top])} & declared:
                undeclared.add(f"{name}: {module}")
    assert not undeclared


def requirements(folder: Path) -> list[Requirement]:
    content = project(folder)["project"]
    extras = content["optional-dependencies"]
    lines = content["dependencies"] + [line for name in extras for line in extras[name]]
    return [each for line in lines if not (each := Requirement(line)).name.startswith("quorate")]


def test_it_requires_less_and_nothing_else_than_the_whole() -> None:
    ours, all_of_it = {str(each) for each in requirements(FOLDER)}, {str(each) for each in requirements(ROOT)}
    assert ours < all_of_it
    names = {Requirement(line).name for line in ours}
    assert not names & {"matplotlib", "optuna", "tensorboard", "pytest", "scikit-learn"}


def test_both_wheels_take_their_version_from_one_file() -> None:
    for folder in (ROOT, FOLDER):
        content = project(folder)
        assert content["project"]["dynamic"] == ["version"]
        source = content["tool"]["hatch"]["version"]
        assert source["pattern"] == 'QUORATE = "(?P<version>[^"]+)"'
        path = (folder / source["path"]).resolve()
        assert path == ROOT / "shared" / "quorate" / "shared" / "protocol" / "versions.py"


def test_its_commands_are_commands_of_the_whole() -> None:
    def names(app: object) -> set[str]:
        commands = {each.callback.__name__ for each in app.registered_commands}  # type: ignore[attr-defined]
        return commands | {each.typer_instance.info.name for each in app.registered_groups}  # type: ignore[attr-defined]

    assert names(small) < names(full)


def test_two_wheels_in_one_place_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_both_wheels()  # the environment of the tests has one
    for name in WHEELS:
        info = tmp_path / f"{name.replace('-', '_')}-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput) as caught:
        refuse_both_wheels()
    facts = ("quorate 9.9 and quorate-client 9.9", "`pip uninstall ")
    assert all(fact in str(caught.value) for fact in facts)


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run outside the repository's influence; returns what was printed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(FOLDER, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def site_machine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and, behind it, the present one's packages but for our own."""
    borrowed = tmp_path_factory.mktemp("borrowed")
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if "quorate" not in entry.name and entry.suffix != ".pth":
            (borrowed / entry.name).symlink_to(entry)
    home = tmp_path_factory.mktemp("site") / "venv"
    install_wheel(wheel, home, borrowed)
    return home


@pytest.mark.slow
def test_it_holds_what_is_listed_and_is_small(wheel: Path) -> None:
    assert wheel.name == f"quorate_client-{QUORATE}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        held = {name for name in names if ".dist-info/" not in name}
        assert held == shipped().keys()
        assert all(archive.read(name) == shipped()[name].read_bytes() for name in held)
    assert not [name for name in held if name.startswith(("quorate/server/", "quorate/simulations/"))]
    assert any(name.endswith("/LICENSE") for name in names)
    assert wheel.stat().st_size < 1_000_000  # nobody's weights or pictures


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_its_commands_work_where_it_is_alone(site_machine: Path, tmp_path: Path) -> None:
    quorate = site_machine / "bin" / "quorate"
    help_text = run(quorate, "--help", cwd=tmp_path)
    assert "data" in help_text and "simulate" not in help_text
    assert "enrol" in run(quorate, "site", "--help", cwd=tmp_path)
    assert run(quorate, "--version", cwd=tmp_path) == f"quorate {QUORATE}\n"
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "site.yaml").write_text("data: {notes: {source: notes.csv}}\n")
    (tmp_path / "notes.csv").write_text(
        "text,label\n"
        + "".join(f"note {number} is {label},{label}\n" for number in range(30) for label in ("yes", "no"))
    )
    printed = run(quorate, "data", "inspect", "run.yaml", "--json", cwd=tmp_path)
    assert '"ok": true' in printed and '"train"' in printed
    with (tmp_path / "notes.csv").open("a") as file:
        file.write("a secret sentence,perhaps\n")
    printed = run(quorate, "data", "inspect", "run.yaml", cwd=tmp_path, code=2)
    assert "notes.csv:62" in printed and "secret" not in printed


@pytest.mark.slow
def test_beside_the_whole_it_refuses_to_work(site_machine: Path, tmp_path: Path) -> None:
    (site_packages,) = site_machine.glob("lib/python*/site-packages")
    info = site_packages / f"quorate-{QUORATE}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quorate\nVersion: {QUORATE}\n")
    try:
        assert "pip uninstall" in run(site_machine / "bin" / "quorate", "--help", cwd=tmp_path, code=2)
    finally:
        (info / "METADATA").unlink()
        info.rmdir()
