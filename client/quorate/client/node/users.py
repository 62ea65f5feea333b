"""The users that a site's processes run as, folders that each of them alone can read, and what each can."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quorate.client.node.folder import CONNECTION_YAML, SITE_YAML, SiteFolder, local_data
from quorate.client.policy.site_config import UsersConfig
from quorate.shared.errors import ConfigError, OutputError
from quorate.shared.process.files import write_atomically


@dataclass(frozen=True)
class SystemUser:
    """An operating-system user."""

    name: str
    uid: int
    gid: int
    home: Path

    @classmethod
    def named(cls, name: str) -> SystemUser:
        """Look a user up.

        Raises: ConfigError: there is none.
        """
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise ConfigError(
                f"users: there is no user {name!r} on this machine; make it with "
                f"`useradd --system --no-create-home {name}`, or take `users` out of site.yaml.",
                kind="no-user",
            ) from None
        return cls(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def accounts(users: UsersConfig | None) -> tuple[SystemUser, SystemUser] | None:
    """Return the users of the site process and of the SuperNode, when site.yaml names them.

    Raises: ConfigError: one is missing, they are the same, or this process may not become another user.
    """
    if users is None:
        return None
    site, supernode = SystemUser.named(users.site), SystemUser.named(users.supernode)
    if site.uid == supernode.uid or supernode.uid == 0:
        raise ConfigError(
            "users: site and supernode must be two users, and supernode not root, or one could read the "
            "other's files.",
            kind="one-user-for-both",
        )
    if os.geteuid() != 0:
        raise ConfigError(
            "users: only root can start processes as other users; use sudo, or take `users` out of site.yaml."
        )
    return site, supernode


def prepare_folders(site: SiteFolder) -> None:
    """Make the folders of a site, with owners and modes so that each process can read its own alone.

    Without `users` everything belongs to whoever starts the site, and to nobody else. With them:

    * site.yaml, data inside FOLDER, FOLDER/anchor, and STATE with all that the site process writes there,
      belong to the site's user. STATE has the SuperNode's group and setgid: that group may walk through it to
      the socket, but not list it.
    * node.key, client.key and STATE/supernode belong to the SuperNode's user.
    * STATE/bin, STATE/logs and STATE/supervisor belong to root: nobody can put another launcher there.

    Raises: ConfigError: users are missing, or cannot get into the folder. OutputError: cannot be written.
    """
    both = accounts(site.users)
    with _owning(site):
        if both is None:
            _prepare_for_one(site)
        else:
            _prepare_for_two(site, *both)
        if not site.secret.exists():
            _write_secret(site.secret, both[1] if both else None)


def check_enrolled(site: SiteFolder) -> None:
    """Raise ConfigError where the site has no node key or no certificate of the federation yet."""
    for path, remedy in (
        (site.node_key, f"make it with `quorate site enrol {site.path}`"),
        (site.ca, "unpack the start-up kit again"),
    ):
        if not path.is_file():
            raise ConfigError(f"{path} is missing; {remedy}.")


def prepare_home(site: SiteFolder) -> None:
    """Make what the SuperNode alone needs, as its user.

    Raises: OutputError: cannot be written.
    """
    with _owning(site):
        for folder in (site.supernode, site.logs, site.supervisor):
            _folder(folder, 0o700)
        if not site.secret.exists():
            _write_secret(site.secret, None)


@contextlib.contextmanager
def _owning(site: SiteFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{error.filename}: {error.strerror}; start the site as the owner of {site.path}."
        raise OutputError(message) from error


def _prepare_for_one(site: SiteFolder) -> None:
    for folder in (site.state, site.logs, site.supervisor, site.supernode):
        _folder(folder, 0o700)
    if site.default_anchor:
        _folder(site.anchor, 0o700)
    _folder(site.bin, 0o755)
    for key in (site.node_key, site.client_key):
        if key.exists():
            key.chmod(0o600)


def _prepare_for_two(site: SiteFolder, own: SystemUser, supernode: SystemUser) -> None:
    site.path.chmod(0o711)
    _folder(site.state, 0o2710, own.uid, supernode.gid)
    if site.default_anchor:
        _folder(site.anchor, 0o700, own.uid, own.gid)
    _folder(site.bin, 0o755, 0, 0)
    for folder in (site.logs, site.supervisor):
        _folder(folder, 0o700, 0, 0)
    _folder(site.supernode, 0o700, supernode.uid, supernode.gid)
    _own(site.path / SITE_YAML, 0o600, own)
    for path in local_data(site).values():
        if path.resolve().is_relative_to(site.path):
            _own_tree(path.resolve(), own)
    for key in (site.node_key, site.client_key):
        if key.exists():
            _own(key, 0o600, supernode)
    for public in (site.path / CONNECTION_YAML, site.ca, site.client_crt):
        if public.exists():
            public.chmod(0o644)
    for each in (own, supernode):
        if blocked := _blocked(site.path, each):
            raise ConfigError(
                f"{blocked}: user {each.name} cannot get into this folder, and so not into {site.path}; "
                f"allow it with `chmod o+x {blocked}`, or move the site elsewhere, such as /srv."
            )


def _folder(path: Path, mode: int, uid: int = -1, gid: int = -1) -> None:
    if path.is_symlink():
        message = f"{path}: must be a folder, not a link; put the folder itself there."
        raise ConfigError(message, kind="link-for-a-folder")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(path, uid, gid)
    path.chmod(mode)  # after chown, which may clear setgid


def _own(path: Path, mode: int, account: SystemUser) -> None:
    if path.is_symlink():
        raise ConfigError(f"{path}: must be a file, not a link; put the file itself there.")
    os.chown(path, account.uid, account.gid)
    path.chmod(mode)


def _own_tree(path: Path, account: SystemUser) -> None:
    """Give a file, or a folder and all in it, to one user alone; links stay as they are."""
    for folder, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        for each in (Path(folder, name) for name in names):
            if not each.is_symlink():
                _own(each, 0o600, account)
        if path.is_dir():
            _own(Path(folder), 0o700, account)


def _blocked(path: Path, account: SystemUser) -> Path | None:
    """Return the folder on the way to `path`, or `path`, that a user cannot walk through."""
    for folder in reversed((path, *path.parents)):
        about = folder.stat()
        own = about.st_uid == account.uid
        shift = 6 if own else 3 if about.st_gid == account.gid else 0
        if account.uid and not about.st_mode >> shift & 1:
            return folder
    return None


def _write_secret(path: Path, owner: SystemUser | None) -> None:
    write_atomically(path, secrets.token_bytes(32), owner=(owner.uid, owner.gid) if owner else None)


def reads(account: SystemUser, paths: Sequence[Path]) -> list[bool]:
    """Return for each file whether a user may read it, for each folder whether it may list it; root asks.

    It is found by becoming that user in a process of its own.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.setgroups([])
            os.setresgid(account.gid, account.gid, account.gid)
            os.setresuid(account.uid, account.uid, account.uid)
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


def reads_tree(account: SystemUser, path: Path) -> list[bool]:
    """Return the same for a file, or for every file in a folder."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return reads(account, files)


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return False
    return True
