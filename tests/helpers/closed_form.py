"""The head that `adapter.head.init: analytic` must give, made without any of its code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from quorate.shared.model.lora_model import load_model

ANALYTIC = {"head": {"init": "analytic"}}


def by_least_squares(x: np.ndarray, y: np.ndarray, w: np.ndarray, strength: float) -> np.ndarray:
    """The ridge [features + 1, outputs] without products of rows: rows and penalty in one factorisation."""
    rows, features = x.shape
    whole = np.hstack([x, np.ones((rows, 1))])
    ridge = strength * float(np.sum(w[:, None] * whole**2)) / (features + 1)
    penalty = np.sqrt(ridge) * np.eye(features, features + 1)
    root = np.sqrt(w)[:, None]
    left = np.vstack([root * whole, penalty])
    right = np.vstack([root * y, np.zeros((features, y.shape[1]))])
    solution: np.ndarray = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution


def plain_features(run: Any, rows: Sequence[Any], layer: str = "classifier") -> np.ndarray:
    """What PEFT's own model gives its head for each row, one row at a time, [rows, features] in float64."""
    model = load_model(run)
    seen: list[torch.Tensor] = []
    head = next(m for n, m in model.peft.named_modules() if n.endswith(f"{layer}.modules_to_save.default"))
    head.register_forward_hook(lambda _module, given, _output: seen.append(given[0]))
    for example in run.task.encode(rows, model.processor):
        with torch.no_grad():
            model.peft(**run.task.collate([example], model.processor).inputs)
    return torch.cat(seen).double().numpy()
