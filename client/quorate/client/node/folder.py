"""Where everything of one site lies, and who may read what.

FOLDER/                 unpacked start-up kit
  site.yaml             the site's own configuration
  connection.yaml       where the server is
  ca.crt                the federation's certificate authority
  node.key, node.pub    identity (`quorate site enrol`)
  client.key, .crt      mutual TLS
  anchor/               heads of the privacy ledger, unless site.yaml names another folder
  state/                site.sock, and what the site process keeps
    ledger/             the privacy ledger
    bin/                the only commands that Flower finds
    logs/               one file per program
    supervisor/         lock and status
    supernode/          home of the SuperNode: Flower's files, its secret, contact.json, the forwarder
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quorate.client.config import ConnectionConfig, SiteConfig, UsersConfig
from quorate.client.node.names import SOCKET
from quorate.shared.config.read import load_file
from quorate.shared.errors import ConfigError, DataError, OutputError
from quorate.shared.sources import resolve_local

SITE_YAML, CONNECTION_YAML = "site.yaml", "connection.yaml"


@dataclass(frozen=True)
class SiteFolder:
    """One site's files. Configuration is read when it is asked for.

    Args:
        path: the folder of the unpacked kit, absolute.
    """

    path: Path

    @classmethod
    def find(cls, path: Path) -> SiteFolder:
        """Return the folder of a site.

        Raises: ConfigError: it holds no connection.yaml.
        """
        if not (path / CONNECTION_YAML).is_file():
            raise ConfigError(
                f"{path.absolute()}: holds no {CONNECTION_YAML}; name the folder that the start-up kit "
                "unpacks to, or change into it."
            )
        return cls(path.resolve())

    @cached_property
    def config(self) -> SiteConfig:
        """site.yaml. Raises: ConfigError."""
        return load_file(SiteConfig, self.path / SITE_YAML)

    @cached_property
    def connection(self) -> ConnectionConfig:
        """connection.yaml. Raises: ConfigError."""
        return load_file(ConnectionConfig, self.path / CONNECTION_YAML)

    @property
    def ca(self) -> Path:
        """Certificate of the federation's authority."""
        return self.path / "ca.crt"

    @property
    def node_key(self) -> Path:
        """Private key that this site is known by."""
        return self.path / "node.key"

    @property
    def client_key(self) -> Path:
        """Private key of mutual TLS."""
        return self.path / "client.key"

    @property
    def client_crt(self) -> Path:
        """Certificate of mutual TLS."""
        return self.path / "client.crt"

    @cached_property
    def users(self) -> UsersConfig | None:
        """As whom the programs run; None: as whoever starts them."""
        return self.config.users

    @property
    def state(self) -> Path:
        """What the processes write."""
        return self.path / Path(self.config.state).expanduser()

    @property
    def ledger(self) -> Path:
        """Folder of the privacy ledger's database."""
        return self.state / "ledger"

    @property
    def anchor(self) -> Path:
        """Folder where the privacy ledger's heads are kept."""
        return self.path / Path(self.config.anchor).expanduser()

    @property
    def default_anchor(self) -> bool:
        """Whether that folder is ours to make; one that was chosen may be a disk that is not mounted."""
        return bool(self.config.anchor == SiteConfig.model_fields["anchor"].default)

    @property
    def socket(self) -> Path:
        """Where the site process listens."""
        return socket_of(self.state)

    @property
    def bin(self) -> Path:
        """Commands for Flower."""
        return self.state / "bin"

    @property
    def logs(self) -> Path:
        """Output of the programs."""
        return self.state / "logs"

    @property
    def supervisor(self) -> Path:
        """Lock and status of the supervisor."""
        return self.state / "supervisor"

    @property
    def supernode(self) -> Path:
        """Home of the SuperNode."""
        return self.state / "supernode"

    @property
    def secret(self) -> Path:
        """What SuperNode and its executor know each other by."""
        return self.supernode / "superexec.secret"

    @property
    def contact(self) -> Path:
        """How the SuperNode stands with the server."""
        return self.supernode / "contact.json"


def socket_of(state: Path) -> Path:
    """Return where the site process of a STATE listens: there, or where the environment says."""
    return Path(os.environ.get(SOCKET) or state / "site.sock")


@dataclass(frozen=True)
class Account:
    """An operating-system user.

    Args:
        name: of the user.
        uid: number of the user.
        gid: number of its primary group.
        home: its home directory.
    """

    name: str
    uid: int
    gid: int
    home: Path

    @classmethod
    def named(cls, name: str) -> Account:
        """Look a user up.

        Raises: ConfigError: there is none.
        """
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise ConfigError(
                f"users: there is no user {name!r} on this machine; make it with "
                f"`useradd --system --no-create-home {name}`, or take `users` out of site.yaml."
            ) from None
        return cls(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def accounts(users: UsersConfig | None) -> tuple[Account, Account] | None:
    """Return the users of the site process and of the SuperNode, when site.yaml names them.

    Raises: ConfigError: one is missing, they are the same, or this process may not become another user.
    """
    if users is None:
        return None
    site, supernode = Account.named(users.site), Account.named(users.supernode)
    if site.uid == supernode.uid or supernode.uid == 0:
        raise ConfigError(
            "users: site and supernode must be two users, and supernode not root, or one could read the "
            "other's files."
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
        raise OutputError(
            f"{error.filename}: {error.strerror}; start the site as the owner of {site.path}."
        ) from error


def _prepare_for_one(site: SiteFolder) -> None:
    for folder in (site.state, site.logs, site.supervisor, site.supernode):
        _folder(folder, 0o700)
    if site.default_anchor:
        _folder(site.anchor, 0o700)
    _folder(site.bin, 0o755)
    for key in (site.node_key, site.client_key):
        if key.exists():
            key.chmod(0o600)


def _prepare_for_two(site: SiteFolder, own: Account, supernode: Account) -> None:
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
        raise ConfigError(f"{path}: must be a folder, not a link; put the folder itself there.")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(path, uid, gid)
    path.chmod(mode)  # after chown, which may clear setgid


def _own(path: Path, mode: int, account: Account) -> None:
    if path.is_symlink():
        raise ConfigError(f"{path}: must be a file, not a link; put the file itself there.")
    os.chown(path, account.uid, account.gid)
    path.chmod(mode)


def _own_tree(path: Path, account: Account) -> None:
    """Give a file, or a folder and all in it, to one user alone; links stay as they are."""
    for folder, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        for each in (Path(folder, name) for name in names):
            if not each.is_symlink():
                _own(each, 0o600, account)
        if path.is_dir():
            _own(Path(folder), 0o700, account)


def local_data(site: SiteFolder) -> dict[str, Path]:
    """Return where the data on this machine's disk lie, by alias; those that are not there are left out."""
    found = {}
    for alias, source in site.config.data.items():
        if source.source.partition(":")[0] in ("hub", "sklearn", "package"):
            continue
        with contextlib.suppress(DataError, ConfigError):  # whoever reads them says what is wrong
            found[alias] = resolve_local(source.source, site.path)
    return found


def _blocked(path: Path, account: Account) -> Path | None:
    """Return the folder on the way to `path`, or `path`, that a user cannot walk through."""
    for folder in reversed((path, *path.parents)):
        about = folder.stat()
        own = about.st_uid == account.uid
        shift = 6 if own else 3 if about.st_gid == account.gid else 0
        if account.uid and not about.st_mode >> shift & 1:
            return folder
    return None


def _write_secret(path: Path, owner: Account | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
        if owner is not None:
            os.fchown(file.fileno(), owner.uid, owner.gid)
