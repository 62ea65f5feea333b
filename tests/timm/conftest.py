"""Let torchvision be imported beside a torch of another build, whose operators it cannot load.

Its published wheels are for CUDA; beside a CPU build of torch they come without their operators, and the
import fails on the first it describes. None of them is used here, so a declaration is enough.
"""

from importlib.util import find_spec

import torch

if find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
        _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
