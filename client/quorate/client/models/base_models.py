"""Base models at a site: found by content hash alone, verified when they are loaded, never fetched.

What path the run file names is of no interest here: paths are the coordinator's, folders are the site's.
"""

from __future__ import annotations

import fnmatch
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quorate.client.policy.site_config import SiteConfig
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError, ModelError
from quorate.shared.model.sources import MODEL_FILES, check_folder, resolve_local
from quorate.shared.process.files import PUBLIC, put_folder

_FOLDER = 0o755
_FIELD = "site.yaml, models.path"


def at_site(run: RunConfig, site: SiteConfig, base_dir: Path) -> RunConfig:
    """Return the run with the site's own folder for its model; `load_model` checks the hash.

    Args:
        run: as the coordinator sent it, with model.sha256.
    Raises: ModelError: the site does not list this model, or its folder is not there.
    """
    for model in site.models:
        if run.model.sha256 is not None and model.sha256 == run.model.sha256:
            folder = find(model.path, base_dir)
            local = run.model.model_copy(update={"model_name_or_path": str(folder), "revision": None})
            return run.model_copy(update={"model": local})
    raise ModelError(
        f"site.yaml lists no model with sha256 {run.model.sha256}; get it, and add its folder and hash to "
        "models.",
        kind="model-not-listed",
    )


def find(reference: str, base_dir: Path) -> Path:
    """Return the folder of a model that site.yaml lists. A hub id is none: nothing is ever fetched.

    Raises: ConfigError, ModelError: it is not there; says what to do.
    """
    try:
        folder = resolve_local(reference, base_dir, where=_FIELD, error=ModelError)
    except ModelError as error:
        raise ModelError(
            f"{error} Models are never fetched: deliver it as an archive, or name the folder of a snapshot "
            "in this machine's hub cache (~/.cache/huggingface/hub/models--.../snapshots/...).",
            kind="model-not-here",
        ) from error
    check_folder(folder, _FIELD)
    return folder.absolute()


@dataclass(frozen=True)
class Imported:
    """A model that was delivered as an archive.

    Args:
        sha256: of its weights, as a run file pins it.
        left_out: names in the archive that are no model files.
    """

    folder: Path
    sha256: str
    left_out: tuple[str, ...]

    @property
    def lines(self) -> str:
        """What to add to site.yaml."""
        return f"models:\n  - path: {self.folder}\n    sha256: {self.sha256}\n"


def import_archive(archive: Path, models_dir: Path, *, sha256: str | None = None) -> Imported:
    """Unpack a delivered base model (tar, also compressed) into a folder of its own under `models_dir`.

    Takes the files that a model is made of, and nothing that could run or leave the folder.

    Args:
        archive: holds the files of one model, at its top or in one folder.
        sha256: what its weights must hash to, as agreed with the coordinator.
    Raises: ModelError: not an archive, a link or a path out of it, another hash, files cut off.
        ConfigError: `models_dir` cannot be written.
    """
    from quorate.shared.model.base_model import whole_files  # torch: only when it is needed

    try:
        if not models_dir.is_dir():
            models_dir.mkdir(parents=True)
            models_dir.chmod(_FOLDER)
        work = Path(tempfile.mkdtemp(prefix=".import-", dir=models_dir))
    except OSError as error:
        raise ConfigError(f"{models_dir}: {error.strerror}; choose a folder that can be written.") from error
    try:
        left_out = _unpack(archive, work)
        _, found = whole_files(work)
        if sha256 is not None and found != sha256:
            message = f"{archive}: its weights have sha256 {found}, not {sha256}; get the right archive."
            raise ModelError(message, kind="archive-of-other-weights")
        folder = models_dir / f"{archive.name.split('.')[0]}-{found[:12]}"
        if folder.exists():
            message = f"{folder} is there already; remove it first, or use it as it is."
            raise ModelError(message, kind="model-there-already")
        # Whatever root's umask is, the site process's user must be able to read it.
        for each in work.iterdir():
            each.chmod(PUBLIC)
        work.chmod(_FOLDER)
        put_folder(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Imported(folder.absolute(), found, left_out)


def _unpack(archive: Path, into: Path) -> tuple[str, ...]:
    """Write the model's files flat into `into`; returns the names of those left out."""
    try:
        with tarfile.open(archive) as tar:
            members = {PurePosixPath(each.name): each for each in _plain_files(tar, archive)}
            folders = [path.parent for path in members if path.name == "config.json"]
            if not folders:
                message = f"{archive} holds no config.json; pack a folder made by save_pretrained."
                raise ModelError(message, kind="no-model-in-archive")
            folder = min(folders, key=lambda path: (len(path.parts), path))
            wanted = {
                path: m for path, m in members.items() if path.parent == folder and _of_model(path.name)
            }
            if sum(member.size for member in wanted.values()) > shutil.disk_usage(into).free:
                raise ModelError(f"{archive}: its files do not fit beside {into}; free some space.")
            for path, member in wanted.items():
                content = tar.extractfile(member)
                assert content is not None  # a regular file
                with content, (into / path.name).open("xb") as stream:
                    shutil.copyfileobj(content, stream, 2**20)
    except (tarfile.TarError, EOFError) as error:
        message = f"{archive} is not a whole tar archive ({str(error).splitlines()[0]}); get it again."
        raise ModelError(message, kind="not-an-archive") from error
    except OSError as error:
        message = f"{archive}: {error.strerror or error}; get it again, or free some space."
        raise ModelError(message) from error
    return tuple(sorted(str(path) for path in members.keys() - wanted.keys()))


def _of_model(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def _plain_files(tar: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files; folders are passed over, anything else ends the import."""
    seen = set()
    for member in tar:
        path, shown = PurePosixPath(member.name), repr(member.name[:100])
        if path.is_absolute() or ".." in path.parts or "\\" in member.name:
            message = f"{archive}: {shown} leads out of the folder; do not use this archive."
            raise ModelError(message, kind="leads-out")
        if member.isdir():
            continue
        if not member.isreg():
            message = f"{archive}: {shown} is a link or a device; pack plain files alone."
            raise ModelError(message, kind="not-a-plain-file")
        if path in seen:
            message = f"{archive} holds {shown} twice; pack the files of one model alone."
            raise ModelError(message, kind="file-twice")
        seen.add(path)
        yield member
