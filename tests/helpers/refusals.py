"""Which check refused, told by what stays when sentences change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from quorate.shared.errors import QuorateError


@contextmanager
def refuses(
    error: type[QuorateError], kind: str | None = None, where: str | None = None
) -> Iterator[pytest.ExceptionInfo[QuorateError]]:
    """Expect `error` of that `kind` and, where it is given, at that place (`QuorateError.where`)."""
    with pytest.raises(error) as caught:
        yield caught
    if kind is not None:
        assert caught.value.kind == kind, str(caught.value)
    if where is not None:
        assert caught.value.where == where, str(caught.value)
