"""The site process, in which training fails as on a lost GPU while the file `lost` lies in the site's folder.

The first process that trains takes the file away, as the next one finds the device well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from quorate.client.process import main
from quorate.client.site import site

_right = site.fit


def _fit(*arguments: Any) -> Any:
    mark = Path(sys.argv[1]) / "lost"
    if mark.exists():
        mark.unlink()
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return _right(*arguments)


if __name__ == "__main__":
    site.fit = _fit
    sys.exit(main.main())
