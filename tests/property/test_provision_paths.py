"""Whatever a federation and its sites are called: every path stays inside its folder."""

import os
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from unittest import mock

from federations import unpack_kit, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

from quorate.client.node.enrolment import enrol
from quorate.client.policy.site_config import ConnectionConfig
from quorate.deploy.provision.provisioning import provision
from quorate.shared.config.config_model import NAME
from quorate.shared.config.read import load_file
from quorate.shared.errors import ConfigError

names = st.from_regex(NAME.removesuffix("$") + r"\Z").map(str)
wild = st.one_of(
    names, st.text(max_size=12), st.sampled_from(["..", "../x", "/x", "a/../b", "a\\b", "~", "C:x"])
)


@settings(max_examples=20)
@given(name=wild, sites=st.lists(wild, min_size=1, max_size=3))
def test_every_path_stays_inside(name: str, sites: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(os, "fsync"):
        top = Path(temporary)
        (top / "in").mkdir()
        file = write_config(top / "in", *sites, name=name)
        with mock.patch.dict(os.environ, {"QUORATE_HOME": str(top / "home")}):
            try:
                done = provision(file, with_keys=True)
            except ConfigError:
                assert [path.name for path in top.rglob("*")] == ["in", "federation.yaml"]
                return
        assert {path.name for path in top.iterdir()} == {"in", "home"}
        assert [path.name for path in (top / "home").iterdir()] == [name]
        assert not [path for path in top.rglob("*") if path.is_symlink()]
        assert {path.name for path in (done.folder.path / "sites").iterdir()} == set(sites)
        for site in sites:
            with tarfile.open(done.folder.site(site) / "kit.tar") as kit:
                for member in kit:
                    parts = PurePosixPath(member.name).parts
                    assert parts[0] == site and len(parts) <= 2 and ".." not in parts
            unpack_kit(done.folder.site(site) / "kit.tar", top / "at" / site)
            place = top / "at" / site / site
            assert load_file(ConnectionConfig, place / "connection.yaml").site == site
            assert not enrol(place).made
