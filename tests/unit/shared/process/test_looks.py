"""What `status` and `check` look at: disks and certificates, each from right to wrong."""

from __future__ import annotations

import errno
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from refusals import refuses
from small_disks import small_disk

from quorate.shared.errors import ConfigError, NotReady, RequestRefused
from quorate.shared.process.looks import (
    LEAST_BYTES,
    LEAST_DAYS,
    SOON_DAYS,
    check_days,
    check_room,
    exit_code,
    line,
)


def days(left: float) -> str:
    now = datetime.now(UTC)
    return check_days("x.crt", now - timedelta(days=30), now + timedelta(days=left), "renew it")


def test_a_certificate_is_spoken_of_before_it_is_held_for_wrong() -> None:
    assert "renew it" not in days(SOON_DAYS + 1)
    assert "soon: renew it" in days(SOON_DAYS - 1)
    assert "soon: renew it" in days(LEAST_DAYS + 1)
    for left, kind, said in (
        (LEAST_DAYS - 1, "ends-soon", " 13.0 days"),
        (2, "ends-soon", " 2.0 days"),
        (-1, "expired", "UTC"),
    ):
        with refuses(NotReady, kind, where="x.crt") as caught:
            days(left)
        assert said in str(caught.value) and "renew it" in str(caught.value)
    now = datetime.now(UTC)
    with refuses(NotReady, "not-yet-valid", where="x.crt"):
        check_days("x.crt", now + timedelta(hours=1), now + timedelta(days=99), "renew it")


def test_room_is_measured_on_the_disk_that_a_folder_will_lie_on(tmp_path: Path) -> None:
    assert "free" in check_room({"state": tmp_path / "not" / "yet" / "there"}, least=1)
    with small_disk(tmp_path / "disk", 2**20) as disk:
        (disk / "a").mkdir()
        found = check_room({"one": disk / "a", "two": disk / "b", "other": tmp_path}, least=2**19)
        assert "(one, two): 1.0 MB free" in found and "(other)" in found
        (disk / "ballast").write_bytes(b"x" * (2**19 + 4096))
        with pytest.raises(NotReady) as caught:
            check_room({"one": disk / "a", "other": tmp_path}, least=2**19)
        assert "(one)" in str(caught.value) and "(other)" not in str(caught.value)
        with pytest.raises(NotReady):
            check_room({"one": disk / "a"})
    assert LEAST_BYTES == 2**30


def test_a_run_warns_where_it_will_write_to_a_disk_that_is_nearly_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from quorate.deploy.control.run_outputs import check_room_for
    from quorate.server.federation.folder import FederationFolder

    with small_disk(tmp_path / "disk", 2**20) as disk:
        check_room_for(FederationFolder(tmp_path / "clinic"), disk / "out")
    (said,) = caplog.messages
    assert "(output)" in said and "(runs)" not in said


def test_a_disk_without_room_for_more_files_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20, files=20) as disk, refuses(NotReady, "no-room") as caught:
        check_room({"state": disk}, least=1)
    assert " files" in str(caught.value)


def test_a_wrong_file_is_told_from_a_machine_that_is_not_ready() -> None:
    def raising(error: Exception) -> str:
        raise error

    good = line("a", lambda: "right")
    unready = line("b", lambda: raising(NotReady("full")))
    errors = (ConfigError("x"), RequestRefused("x"), PermissionError(errno.EACCES, "no", "file"))
    wrong = [line("c", partial(raising, error)) for error in errors]
    assert (good.ok, unready.ok, [each.ok for each in wrong]) == (True, False, [False] * 3)
    assert exit_code([]) == exit_code([good]) == 0
    assert exit_code([good, unready]) == 1
    assert all(exit_code([unready, each, good]) == 2 for each in wrong)
