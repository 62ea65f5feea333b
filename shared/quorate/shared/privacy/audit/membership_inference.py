"""Membership inference: how well training rows can be told from others.

The score is RMIA's (Zarifzadeh, Liu and Shokri 2024, arXiv:2312.03262), the two figures it is reported by are
those of Carlini et al. 2022 (arXiv:2112.03570).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from quorate.shared.config.config_model import ConfigModel

Figures = NDArray[np.float64]
LOW_FPR = 0.01
"""The false-positive rate at which the true-positive rate is told."""
GAMMA = 1.0
"""RMIA's threshold on the likelihood ratio of a row against a row of the population."""


class Attack(ConfigModel):
    """What an attack achieved, with 95 % intervals."""

    members: int = Field(ge=1)
    """Rows that were trained on."""
    others: int = Field(ge=1)
    """Rows that were not."""
    auc: float = Field(ge=0, le=1)
    """Chance that a member scores above another row; 0.5 is guessing."""
    auc_interval: tuple[float, float]
    """From resampling members and others."""
    tpr_at_low_fpr: float = Field(ge=0, le=1)
    """Share of members found while at most LOW_FPR of the others are taken for members."""
    tpr_interval: tuple[float, float]
    """Clopper and Pearson's, for the threshold that was found."""


def rmia(
    target: Figures, references: Figures, population: Figures, population_references: Figures
) -> Figures:
    """Return RMIA's score of each row: the share of the population that it beats by GAMMA.

    Args:
        target: [n] mean log-likelihood of the rows under the audited model.
        references: [k, n] the same under k models that did not see them.
        population: [z] the same of rows that nobody trained on, under the audited model.
        population_references: [k, z] the same under the reference models.
    """
    rows = _log_ratio(target, references)
    others = np.sort(_log_ratio(population, population_references))
    beaten = np.searchsorted(others, rows - np.log(GAMMA), side="right")
    return np.asarray(beaten / len(others), dtype=np.float64)


def _log_ratio(target: Figures, references: Figures) -> Figures:
    """Return log p(x | target) - log p(x), with p(x) the mean over models that did not see x.

    That is the paper's offline form with its constant a at 1: an adapter moves the likelihood of a row it was
    trained on by little, so what a model says that did not see the row needs no correction upwards.
    """
    return np.asarray(target - np.log(np.exp(references).mean(axis=0)), dtype=np.float64)


def auc(members: Figures, others: Figures) -> float:
    """Return the area under the ROC curve; ties count half (Mann and Whitney)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    n, m = len(members), len(others)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def attack(members: Figures, others: Figures, *, samples: int = 1000, seed: int = 0) -> Attack:
    """Return what a score achieves at telling members from others.

    Args:
        members: [n] scores of training rows; higher is more like a member.
        others: [m] scores of rows not trained on, from the same source.
        samples: resamples for the interval of the area.
        seed: of the resamples.
    Raises: ValueError: one of them is empty, or a score is not finite.
    """
    from scipy.stats import beta

    if not len(members) or not len(others):
        raise ValueError("membership needs rows that were trained on and rows that were not")
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise ValueError("a score is not finite")
    drawn = np.random.default_rng(seed)
    areas = [
        auc(drawn.choice(members, len(members)), drawn.choice(others, len(others))) for _ in range(samples)
    ]
    low, high = np.quantile(areas, [0.025, 0.975]) if areas else (0.0, 1.0)
    threshold = _threshold(others)
    found, n = int((members > threshold).sum()), len(members)
    return Attack(
        members=n,
        others=len(others),
        auc=auc(members, others),
        auc_interval=(float(low), float(high)),
        tpr_at_low_fpr=found / n,
        tpr_interval=(
            float(beta.ppf(0.025, found, n - found + 1)) if found else 0.0,
            float(beta.ppf(0.975, found + 1, n - found)) if found < n else 1.0,
        ),
    )


def _threshold(others: Figures) -> float:
    """Return the smallest score that at most LOW_FPR of the others exceed."""
    allowed = int(np.floor(LOW_FPR * len(others)))
    return float(np.sort(others)[len(others) - 1 - allowed])
