"""A site's folder on disk, requests to it, and its process."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quorate.client.node.folder import SiteFolder
from quorate.client.policy.site_config import ConnectionConfig, SiteConfig
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.config.read import dump_yaml
from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.base_model import hash_files
from quorate.shared.model.weights import weights_sha256
from quorate.shared.protocol.messages import RequestHeader, RoundRequest
from quorate.shared.protocol.versions import versions

RUN_ID = "0123456789abcdef"
SITE = "north"
_WORDS = {
    "cardiac": ("heart", "blood", "rhythm"),
    "hepatic": ("liver", "dose", "drug"),
    "pulmonary": ("lung", "cough", "scan"),
}


def sha256_of(model: Path) -> str:
    """The content hash of a model's folder, as a run file pins it."""
    return weights_sha256(hash_files(model), model)


def write_folder(path: Path, model: Path, **policy: Any) -> SiteFolder:
    """Write site.yaml, connection.yaml and 30 rows of each label."""
    draw = random.Random(5)
    lines = [
        f"{draw.choice(words)} {draw.choice(words)} {draw.choice(('fever', 'pain'))},{label}"
        for _ in range(30)
        for label, words in _WORDS.items()
    ]
    path.mkdir(parents=True, exist_ok=True)
    (path / "notes.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    site = SiteConfig.model_validate(
        {
            "data": {"notes": {"source": "notes.csv"}},
            "models": [{"path": str(model), "sha256": sha256_of(model)}],
            "device": "cpu",
            "policy": policy,
        }
    )
    connection = ConnectionConfig(federation="trial", site=SITE, server="localhost:9443")
    (path / "site.yaml").write_text(dump_yaml(site))
    (path / "connection.yaml").write_text(dump_yaml(connection))
    return SiteFolder.find(path)


def fix_splits(folder: SiteFolder) -> None:
    """Give the site a key as its process would make one; with this one, 58 of the 90 rows are trained on."""
    place = folder.state / "splits"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    (place / "key").write_bytes(hashlib.sha256(b"366").digest())
    (place / "key").chmod(0o600)


def request(
    run: RunConfig, phase: str = "fit", round: int = 1, arrays: Adapter | None = None, **fields: Any
) -> RoundRequest:
    """A request as the coordinator makes it."""
    header = {
        "run_id": RUN_ID,
        "round": round,
        "phase": phase,
        "site": SITE,
        "run_config": run.canonical_json(),
        "config_hash": run.content_hash,
        "versions": versions() if phase == "join" else {},
        **({"split": "validation"} if phase == "evaluate" else {}),
        **fields,
    }
    return RoundRequest(RequestHeader.model_validate(header), arrays)


class SiteProcess:
    """The real process of a site's folder; what it logs is in `log`.

    Args:
        folder: of site.yaml.
    """

    def __init__(self, folder: SiteFolder) -> None:
        self.folder = folder
        fix_splits(folder)
        self._log = folder.path / "process.log"
        self.process = self._start()

    @property
    def log(self) -> str:
        """All that the processes of this folder wrote."""
        return self._log.read_text()

    def wait(self, text: str, seconds: float = 200) -> None:
        """Wait until the log holds `text`."""
        end = time.monotonic() + seconds
        while text not in self.log:
            assert time.monotonic() < end and self.process.poll() is None, self.log
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Start it again."""
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "quorate.client.process.main", str(self.folder.path), "--verbose"]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
