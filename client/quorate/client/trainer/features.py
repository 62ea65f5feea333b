"""What the head is given: the frozen model's features of a site's rows, taken at the head's own input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from quorate.client.trainer.evaluate import forward
from quorate.client.trainer.stack import AdapterStack, StackedLinear
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.adapters.linear_head import LinearHead
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ModelError
from quorate.shared.tasks.task import Example


def head_inputs(
    stack: AdapterStack, run: RunConfig, adapter: Adapter, examples: Sequence[Example], head: LinearHead
) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
    """Yield (row indices, features [rows, features]) over all examples; nothing drops out.

    Raises: ModelError: the layer is not given one vector a row, or more is done with what it gives.
    """
    layers = (m for m in stack.model.peft.modules() if isinstance(m, StackedLinear))
    module = next(m for m in layers if m.weight is stack.arrays[head.weight])
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((given[0], output))

    hook = module.register_forward_hook(keep)
    try:
        for rows, _, logits in forward(stack, run, adapter, examples):
            ((given, output),) = seen if len(seen) == 1 else ((None, None),)
            seen.clear()
            if given is None or given.shape != (len(rows), head.features):
                raise ModelError(
                    f"adapter.head.init analytic: {head.name} sees tokens or patches, not one vector of "
                    f"{head.features} features a row; choose adapter.head.init: random.",
                    kind="head-sees-tokens",
                )
            if output is None or output.shape != logits.shape or not output.equal(logits):
                raise ModelError(
                    f"adapter.head.init analytic: the model goes on with what {head.name} gives, so a linear "
                    "solution is not its answer; choose adapter.head.init: random.",
                    kind="head-is-not-the-answer",
                )
            yield rows, given.float().cpu().numpy()
    finally:
        hook.remove()
