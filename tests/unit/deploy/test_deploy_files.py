"""Files of deploy/ that other programs read: what can be checked without running what they start."""

import hashlib
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from quorate.shared.protocol.versions import QUORATE

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSE = sorted((DEPLOY / "compose").glob("*/compose.yaml"))
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
SCRIPTS = sorted((DEPLOY / "airgap").glob("*.sh"))


def needs(program: str) -> Any:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def settings(unit: Path) -> dict[str, list[str]]:
    """What a unit says: name -> values, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


def verify(text: str, name: str, folder: Path) -> str:
    """Return what `systemd-analyze verify` has to say of a unit; nothing where it is right."""
    unit = folder / name.replace("@.", "@demo.")
    unit.write_text(text.replace("/opt/quorate/bin/quorate", "/bin/true"))
    for other in UNITS:  # which they name
        (folder / other.name).write_text(other.read_text().replace("/opt/quorate/bin/quorate", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", unit],
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_units(unit: Path, tmp_path: Path) -> None:
    assert verify(unit.read_text(), unit.name, tmp_path) == ""
    typo = unit.read_text().replace("PrivateTmp=", "PrivateTemp=")
    assert "PrivateTemp" in verify(typo, unit.name, tmp_path)


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_shut_in_what_they_start(unit: Path, tmp_path: Path) -> None:
    instance = tmp_path / unit.name.replace("@.", "@demo.")
    shutil.copy(unit, instance)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=20", instance],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr  # exposure is above 2.0 of 10


def test_the_process_with_the_data_has_no_network_and_the_other_one_no_data() -> None:
    site, node = (settings(DEPLOY / "systemd" / f"quorate-{name}@.service") for name in ("site", "supernode"))
    assert site["PrivateNetwork"] == ["yes"] and "PrivateNetwork" not in node
    assert site["User"] != node["User"]
    assert node["ReadWritePaths"] == ["/var/lib/quorate/%i/state/supernode"]
    # torch does not train under it, as tried; Flower's programs run.
    assert "MemoryDenyWriteExecute" not in site and node["MemoryDenyWriteExecute"] == ["yes"]


@needs("systemd-sysusers")
def test_the_users_of_the_units_are_made() -> None:
    file = DEPLOY / "systemd" / "quorate.sysusers"
    done = subprocess.run(["systemd-sysusers", "--dry-run", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for unit in UNITS:
        (user,) = settings(unit)["User"]
        assert f"u {user} " in " ".join(file.read_text().split())


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.parent.name)
def test_containers_are_shut_in(file: Path) -> None:
    for name, service in yaml.safe_load(file.read_text())["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service["user"].startswith("0"), name
        assert not {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode"} & service.keys(), name
        assert QUORATE in service["image"], name


def targets(service: dict[str, Any]) -> dict[str, bool]:
    """Where a service's volumes lie -> whether it may write there; named volumes as NAME:PATH."""
    return {
        volume if isinstance(volume, str) else volume["target"]: isinstance(volume, str)
        or not volume.get("read_only", False)
        for volume in service["volumes"]
    }


def test_a_sites_two_containers_share_the_socket_alone() -> None:
    services = yaml.safe_load((DEPLOY / "compose" / "site" / "compose.yaml").read_text())["services"]
    site, node = targets(services["site"]), targets(services["supernode"])
    assert site.keys() & node.keys() == {"socket:/run/quorate"}
    assert services["site"]["network_mode"] == "none"
    assert not [target for target in node if target.startswith(("/data", "/models")) or "site.yaml" in target]
    assert not [target for target in site if "key" in target]
    assert not site["/data"] and not site["/models"] and not node["/node/node.key"]


def test_the_server_publishes_the_public_port_alone() -> None:
    (service,) = yaml.safe_load((DEPLOY / "compose" / "server" / "compose.yaml").read_text())[
        "services"
    ].values()
    assert service["ports"] == ["${PUBLIC_PORT:-9443}:${SERVER_PORT:-9443}"]


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.parent.name)
def test_compose_takes_the_files(file: Path) -> None:
    compose = ["docker", "compose"]
    if (
        shutil.which("docker") is None
        or subprocess.run([*compose, "version"], capture_output=True).returncode
    ):
        compose = ["docker-compose"]
        if shutil.which("docker-compose") is None:
            pytest.skip("neither docker compose nor docker-compose is installed")
    values = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "FEDERATION": "/f",
        "KIT": "/k",
        "DATA": "/d",
        "MODELS": "/m",
    }
    done = subprocess.run(
        [*compose, "-f", file, "config", "--quiet"], env=values, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_are_pinned_and_not_roots(file: Path) -> None:
    text = file.read_text()
    stages = text.split("\nFROM ")[1:]
    final = [stage for stage in stages if "ENTRYPOINT" in stage]
    assert final and all("\nUSER 1" in stage for stage in final)
    for line in text.replace("\\\n", " ").splitlines():
        if "pip install" in line and "/opt/build" not in line:
            assert "-c /tmp/constraints.txt" in line, line
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in text.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            assert set(line.split()[1:-1]) <= allowed, f"{line}: .dockerignore leaves it out"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_scripts(script: Path) -> None:
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["sh", "-n", script], check=True)


@pytest.fixture
def wheelhouse(tmp_path: Path) -> Path:
    """A wheelhouse of one small wheel, made here, with our script in it."""
    folder = tmp_path / "house"
    (folder / "wheels").mkdir(parents=True)
    shutil.copy(DEPLOY / "airgap" / "install.sh", folder)
    (folder / "constraints.txt").write_text("")
    (folder / "install.txt").write_text("nothing-of-ours\n")
    (folder / "wheels" / "nothing_of_ours-1-py3-none-any.whl").write_bytes(
        b"not read, since the sums are wrong"
    )
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(folder)}\n" for path in files
    ]
    (folder / "SHA256SUMS").write_text("".join(sums))


def install(folder: Path, *options: str) -> str:
    """Run install.sh, which must refuse; returns what it said."""
    done = subprocess.run(
        [folder / "install.sh", *options, folder.parent / "venv"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert not (folder.parent / "venv").exists()
    return done.stdout + done.stderr


def test_a_wheelhouse_that_was_changed_is_not_installed(wheelhouse: Path) -> None:
    (wheelhouse / "wheels" / "nothing_of_ours-1-py3-none-any.whl").write_bytes(b"other bytes")
    assert "not as SHA256SUMS says" in install(wheelhouse)


def test_a_wheelhouse_with_a_file_more_is_not_installed(wheelhouse: Path) -> None:
    (wheelhouse / "wheels" / "torch-99-py3-none-any.whl").write_bytes(b"preferred by pip, being newer")
    assert "torch-99" in install(wheelhouse)


def test_a_wheelhouse_with_new_sums_is_noticed_by_their_sum(wheelhouse: Path) -> None:
    told = hashlib.sha256((wheelhouse / "SHA256SUMS").read_bytes()).hexdigest()
    (wheelhouse / "wheels" / "nothing_of_ours-1-py3-none-any.whl").write_bytes(b"other bytes")
    seal(wheelhouse)
    assert "not the one you were told of" in install(wheelhouse, "-s", told)


def test_what_images_install_is_a_requirement_of_the_wheel() -> None:
    text = (DEPLOY / "client-wheel" / "pyproject.toml").read_text()
    for file in DOCKERFILES:
        for line in file.read_text().splitlines():
            if line.startswith("ARG EXTRAS="):
                assert all(f"\n{extra} = [" in text for extra in Requirement(f"x[{line[11:]}]").extras)
