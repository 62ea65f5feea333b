"""Linear algebra on products left @ right that are too large to write out: factors in, factors out.

Everything here computes in float64 and never forms the m x n product.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def compress(left: Matrix, right: Matrix, *, floor: float = 0.0) -> tuple[Matrix, Matrix]:
    """Return factors of the same product with the fewest columns, by QR of both and an SVD of the core.

    Args:
        left: [m, R].
        right: [R, n].
        floor: singular values up to this are rounding noise as well [units of left @ right]; for factors
            that are differences of far larger numbers, whose own size says nothing of their error.
    Returns: left' [m, q] and right' [q, n], q the numerical rank (at most min(m, n, R), 0 for a product that
        is numerically zero). Singular values are shared equally between the two, largest first.
    """
    if not left.shape[1]:
        return left, right
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, values, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # Backward error of the QRs and the product: relative to the norms of the factors, not of the product.
    size = float(np.linalg.norm(left) * np.linalg.norm(right))
    noise = float(np.finfo(np.float64).eps) * max(*left.shape, *right.shape) * size
    rank = int(np.count_nonzero(values > max(noise, floor)))
    root = np.sqrt(values[:rank])
    return q_left @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ q_right.T
