"""Where models and data lie: folders and files, resources inside installed packages, hub ids.

Nothing here runs code of the thing it finds: packages are located without being imported.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from functools import partial
from pathlib import Path, PurePosixPath

from quorate.shared.errors import BadInput, ConfigError, DataError, ModelError

log = logging.getLogger(__name__)

PACKAGE = "package:"
# What `from_pretrained` needs, and nothing that could run: no .bin, .pt, .pkl, .py.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.model",
    "chat_template*",
)
_MODEL_FIELD = "model.model_name_or_path"
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def expand(text: str, where: str) -> str:
    """Replace each `${VARIABLE}` from the environment.

    Args:
        text: a path or reference of a run or sites file.
        where: the file and field it stands in, for messages.
    Raises: ConfigError: a variable is unset or empty, or `${` is not closed.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not _IDENTIFIER.fullmatch(name):
            message = f"{where}: ${{{name}}} in {text!r} is not the name of an environment variable."
            raise ConfigError(message, kind="not-a-variable")
        found = os.environ.get(name)
        if not found:
            raise ConfigError(
                f"{where}: environment variable {name} is not set, but {text!r} needs it; "
                f"set it (export {name}=...) or write the path out.",
                kind="variable-unset",
            )
        return found

    expanded = _VARIABLE.sub(value, text)
    if "${" in _VARIABLE.sub("", text):
        message = f"{where}: {text!r} holds a ${{ without its }}; write ${{NAME}}."
        raise ConfigError(message, kind="variable-open")
    return expanded


def resolve_local(
    reference: str, base_dir: Path, *, where: str = "source", error: type[BadInput] = DataError
) -> Path:
    """Find a file or folder on this machine.

    Args:
        reference: an absolute path, one relative to `base_dir`, `~/...`, or `package:NAME/PATH` for a
            resource inside an installed package, which is not imported. `${VARIABLE}` is replaced.
        base_dir: where relative paths start.
        where: the file and field the reference stands in, for messages.
        error: what to raise when there is nothing.
    Returns: an existing path.
    Raises: ConfigError: an unset variable. `error`: nothing there, or a malformed package reference.
    """
    text = expand(reference, where)
    if text.startswith(PACKAGE):
        return _in_package(text, where, error)
    path = base_dir / Path(text).expanduser()
    if not path.exists():
        origin = "" if text == reference else f" (from {reference})"
        message = f"{where}: {path}{origin} does not exist; correct the path or put the data there."
        raise error(message, kind="nothing-there")
    return path


def is_hub_id(reference: str, base_dir: Path | None = None) -> bool:
    """Whether a model reference is a hub id: formed like one, and no folder of that name is there."""
    folder = (base_dir or Path.cwd()) / reference
    return not folder.exists() and _HUB_ID.fullmatch(reference) is not None


def resolve_model(
    reference: str, revision: str | None, *, base_dir: Path | None = None, where: str = _MODEL_FIELD
) -> Path:
    """Find a model's folder: a folder, a package resource, or a hub id.

    An existing folder wins over a hub id of the same name. A hub id is taken from the local cache where it is
    there, else fetched, which is logged; with HF_HUB_OFFLINE=1 nothing is ever fetched.

    Args:
        reference: as in the run file; `${VARIABLE}` is replaced.
        revision: commit, tag or branch of a hub id.
        base_dir: where relative folders start; the working directory when left out.
        where: the file and field the reference stands in, for messages.
    Returns: a folder that holds the model's files.
    Raises: ConfigError: an unset variable. ModelError: nothing there, or the hub cannot give it.
    """
    text = expand(reference, where)
    base_dir = base_dir or Path.cwd()
    if text.startswith(PACKAGE):
        folder = _in_package(text, where, ModelError)
    else:
        if text == reference and is_hub_id(text, base_dir):
            return _from_hub(text, revision, where)
        folder = base_dir / Path(text).expanduser()
    if not folder.exists():
        raise ModelError(
            f"{where}: {folder} does not exist; correct the path, or give a hub id (ORGANISATION/NAME) "
            "or package:NAME/FOLDER.",
            kind="no-model-there",
        )
    check_folder(folder, where)
    return folder


def check_folder(path: Path, where: str) -> None:
    """Raise ModelError for a model's folder that is none; `where` is the file and field that names it."""
    if not path.is_dir():
        message = f"{where}: {path} is a file; name the folder that holds config.json."
        raise ModelError(message, kind="model-is-a-file")


def _in_package(text: str, where: str, error: type[BadInput]) -> Path:
    """Find `package:NAME/PATH` without importing NAME."""
    name, _, rest = text.removeprefix(PACKAGE).partition("/")
    inside = PurePosixPath(rest)
    # Top-level names only: to find a sub-package, Python imports its parent.
    if not _IDENTIFIER.fullmatch(name) or inside.is_absolute() or ".." in inside.parts or "\\" in rest:
        raise error(
            f"{where}: {text!r} is not package:NAME/PATH with the import name of an installed top-level "
            "package and a path inside it.",
            kind="not-a-package-path",
        )
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise error(
            f"{where}: package {name} is not installed (or is not a package); install it in this "
            "environment.",
            kind="no-such-package",
        )
    for location in spec.submodule_search_locations:
        if (path := Path(location) / inside).exists():
            return path
    message = f"{where}: package {name} holds no {rest}; correct the path or install the right version."
    raise error(message, kind="not-in-package")


def _from_hub(repo_id: str, revision: str | None, where: str) -> Path:
    """Return the cached snapshot of a hub model, fetching it first where that is needed and allowed."""
    from huggingface_hub import constants, snapshot_download

    # Taken from there because the HTTP library under the hub's client has changed and may change again.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    fetch = partial(snapshot_download, repo_id, revision=revision, allow_patterns=list(MODEL_FILES))
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(fetch(local_files_only=True))
    except HFValidationError as problem:
        message = f"{where}: {repo_id!r} is neither a folder nor a hub id."
        raise ModelError(message, kind="neither-folder-nor-hub-id") from problem
    except LocalEntryNotFoundError as problem:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{where}: {repo_id!r} is no folder, and as a hub id{at} it is not in the local cache; "
                "HF_HUB_OFFLINE forbids fetching it: unset it, or give a folder.",
                kind="fetching-forbidden",
            ) from problem
    log.warning("fetching model %s%s from the hub (HF_HUB_OFFLINE=1 forbids it)", repo_id, at)
    try:
        return Path(fetch())
    except (HTTPError, OSError) as problem:
        raise ModelError(
            f"{where}: {repo_id!r} is no folder, and the hub could not give it{at} "
            f"({type(problem).__name__}); check the name, the revision, your access and the network, "
            "or give a folder.",
            kind="hub-gives-nothing",
        ) from problem
