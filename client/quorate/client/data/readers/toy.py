"""Small data sets that ship inside scikit-learn; they are for demonstrations."""

from __future__ import annotations

from importlib import import_module

from quorate.shared.errors import DataError
from quorate.shared.tasks.task import Row

BUNDLED = ("breast_cancer", "iris", "wine")
"""Loaders whose data lie in the package itself: nothing is fetched."""


def read_sklearn(name: str) -> list[Row]:
    """Read a data set of scikit-learn: its features as columns, and its class name as column `label`.

    Raises: DataError: not one of `BUNDLED`, or scikit-learn is not installed.
    """
    if name not in BUNDLED:
        message = f"sklearn:{name} is not among the data sets that can be used: {', '.join(BUNDLED)}."
        raise DataError(message, kind="unknown-toy")
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise DataError(f"sklearn:{name} needs scikit-learn; pip install 'quorate[demo]'.") from error
    bunch = getattr(datasets, f"load_{name}")()
    classes = [str(label) for label in bunch.target_names]
    columns = [str(column) for column in bunch.feature_names]
    return [
        Row(
            {**dict(zip(columns, features, strict=True)), "label": classes[target]},
            f"sklearn:{name}:{number}",
        )
        for number, (features, target) in enumerate(
            zip(bunch.data.tolist(), bunch.target.tolist(), strict=True), start=1
        )
    ]
