"""What a GPU's errors mean for a site: too little memory, or a device that is lost.

After most CUDA errors (an illegal access, an assertion on the device) every further call of the process fails
too, so a site that lost its device answers with a code of its own, ends, and is started again by whoever
watches over it. No torch here: errors are known by their types' names.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Callable, Sequence

from quorate.client.site.request import Request, failed
from quorate.shared.errors import QuorateError
from quorate.shared.protocol.messages import Update

log = logging.getLogger(__name__)

OUT_OF_MEMORY, DEVICE_LOST = "out-of-memory", "device-lost"
LOST_EXIT = 75
"""Exit code of a site process that lost its device: another process may find it well (EX_TEMPFAIL)."""
# By text: what torch on the CPU, and torch before it had types of their own for these, raise.
_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")
_LOST = re.compile(r"\b(CUDA|HIP|XPU|cuDNN) error\b|device-side assert|STATUS_EXECUTION_FAILED")


class OutOfMemory(QuorateError):
    """A pass needs more memory than there is."""

    code = OUT_OF_MEMORY


class DeviceLost(QuorateError):
    """The GPU (or another accelerator) takes no more calls from this process."""

    code = DEVICE_LOST


def of_device(error: BaseException) -> QuorateError | None:
    """Return what an error, or its cause, means; None for one that is not of a device or of memory."""
    if isinstance(error, QuorateError):
        # Made of another error, as a ModelError of a base that does not fit.
        return None if error.__cause__ is None else of_device(error.__cause__)
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if names & {"OutOfMemoryError", "MemoryError"}:
        return OutOfMemory(_REMEDY)
    if "RuntimeError" not in names:
        return None
    if _MEMORY.search(text):
        return OutOfMemory(_REMEDY)
    if "AcceleratorError" in names or _LOST.search(text):
        return DeviceLost(
            "the device failed; this process ends, and is to be started again. See above for why."
        )
    return None


_REMEDY = (
    "too little memory for this pass; have the coordinator lower training.per_device_train_batch_size (and "
    "raise training.gradient_accumulation_steps), or set training.gradient_checkpointing, or train on "
    "another device."
)


def in_smaller_stacks(
    answer: Callable[[Sequence[Request]], list[Update]], requests: Sequence[Request]
) -> list[Update]:
    """Answer requests that share one pass; where memory does not suffice, in two halves, and so on.

    Stacked sites are each what they would be alone, so halves change no answer.
    Returns: the answers, in order; that of a site that fails is an error code.
    """
    try:
        return answer(requests)
    except Exception as error:  # any failure must reach the coordinator as a code, and no further
        meant = of_device(error)
        if len(requests) == 1 or not isinstance(meant, OutOfMemory):
            _log_cause(error, meant)
            return [failed(request, meant or error) for request in requests]
    # Not in the except clause: the error holds on to the arrays of the pass.
    log.warning("a stack of %d sites needs too much memory; trying halves of it", len(requests))
    free_memory()
    half = len(requests) // 2
    return [*in_smaller_stacks(answer, requests[:half]), *in_smaller_stacks(answer, requests[half:])]


def _log_cause(error: Exception, meant: QuorateError | None) -> None:
    if meant is not None:
        log.error("%s", meant, exc_info=error)


def free_memory() -> None:
    """Give back what nobody holds any more, so that the next pass finds it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
