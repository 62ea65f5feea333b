"""What a site accepts of a coordinator: what the run itself implies, and nothing more.

A run's configuration is held against the site's policy; what comes with it could still say something else.
Arrays that the run's rule does not send, a residual on a base that the rule leaves alone, or a phase with
parts of another one would walk round that policy, so each is refused before anything of it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quorate.client.site.request import Request
from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, Array
from quorate.shared.adapters.selection import download_schema
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B
from quorate.shared.errors import AdapterError, ProtocolError, RequestRefused
from quorate.shared.model.lora_model import LoadedModel

_WITHOUT_ROUND = ("join", "start", "statistics", "alone")
"""Phases outside of the rounds: they begin from the seeded start, so no arrays come with them."""


@dataclass(frozen=True)
class BaseLimits:
    """How far a site lets a rule move its frozen base.

    Args:
        max_rank: of a layer's residual; None for no limit but the layer's own.
        max_change: Frobenius norm of a layer's residual product over that of the layer's weight; None for no
            limit.
    """

    max_rank: int | None = None
    max_change: float | None = None

    def admit(self, layer: str, change: float) -> None:
        """Raise RequestRefused where a layer's change is not within the limit."""
        if self.max_change is not None and not change <= self.max_change:
            raise RequestRefused(
                f"policy.max_base_change is {self.max_change:g}, the run changes the weight of {layer} by "
                f"{change:.3g} of its norm; if the base model may be changed that far, raise it in "
                "site.yaml, else find out what the coordinator sent.",
                code="policy-base",
            )


def check_header(request: Request) -> None:
    """Raise ProtocolError unless the run has such a phase, and round, split and delivery are those of it."""
    header = request.header
    phase, round, last = header.phase, header.round, request.run.federation.rounds
    if phase in _WITHOUT_ROUND and round != 0:
        raise ProtocolError(f"a request to {phase} names round {round}; it has none.")
    if phase not in _WITHOUT_ROUND and not 1 <= round <= last:
        raise ProtocolError(f"a request to {phase} names round {round} of {last}.")
    if phase == "statistics" and not request.run.solves_head:
        raise ProtocolError(
            "a request for sums over rows, in a run that does not solve its head from any.",
            kind="no-sums-in-this-run",
        )
    if (header.split is None) == (phase == "evaluate"):
        raise ProtocolError("a request names a split of the rows if it is to evaluate, and only then.")
    # They may be rows that a private run was trained on, whose figures would be exact under any other run.
    if header.split == "train":
        raise ProtocolError("no run has figures on training rows; validation and test rows are measured.")
    if (header.delivery is None) == (phase == "finish"):
        raise ProtocolError("a request brings figures if it brings a result, and only then.")


def check_arrays(request: Request, initial: Adapter) -> None:
    """Hold the arrays of a request against those that the run's rule sends.

    Args:
        request: says run, phase and round; a site has what is missing from its seeded start.
    Raises: AdapterError: an array that the rule does not send, or of another shape; a residual that is no
        pair of factors, is of a layer without an adapter, or of a rank that cannot have come about.
        NonFiniteUpdate: NaN or infinity.
    """
    run, header, arrays = request.run, request.header, request.arrays
    if header.phase in _WITHOUT_ROUND:
        schema: Mapping[str, tuple[int, ...]] = {}
    else:
        schema = download_schema(run, own_schema(request, initial), header.round)
    if len(arrays) > len(schema) + 2 * len(initial):
        raise AdapterError(f"{len(arrays)} arrays, where {len(schema)} and their residual would be the most.")
    adapter = request.state.adapter
    adapter.check_schema({name: schema[name] for name in schema.keys() & adapter.keys()})
    # A round is sent to before it is aggregated; what is measured or delivered has been.
    done = header.round - (header.phase == "fit")
    rank = run.aggregation.residual_rank(run.adapter.r, done, run.federation.sites_per_round) if schema else 0
    for layer, (left, right) in _pairs(request.state.residual).items():
        _check_pair(layer, left.shape, right.shape, schema, rank)
    request.state.residual.check_schema(request.state.residual.schema)  # its dtype
    arrays.check_finite()


def own_schema(request: Request, initial: Adapter) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the adapter that the site has in this phase: its own part where it trains."""
    rule, header = request.run.aggregation, request.header
    trains = header.phase in rule.exchanges(header.round)
    return rule.site_schema(initial.schema, header.site) if trains else initial.schema


def check_base_change(model: LoadedModel, residual: Adapter, limits: BaseLimits) -> None:
    """Refuse a residual, of the right shape, that moves the base further than the site allows.

    Raises: RequestRefused: with rule, value and remedy. ModelError: a layer of the base cannot be moved.
    """
    for layer, (left, right) in _pairs(residual).items():
        rank = right.shape[0]
        if limits.max_rank is not None and rank > limits.max_rank:
            raise RequestRefused(
                f"policy.max_residual_rank is {limits.max_rank}, the run changes {layer} by a product of "
                f"rank {rank}; raise it in site.yaml, or have the coordinator choose a rule that leaves the "
                "base alone.",
                code="policy-base",
            )
        if limits.max_change is not None:
            limits.admit(layer, model.base_change(layer, left, right))


def _pairs(residual: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Return layer -> (residual_B, residual_A).

    Raises: AdapterError: one of the two is missing.
    """
    pairs = {}
    for layer in _layers(residual):
        left, right = residual.get(layer + RESIDUAL_B), residual.get(layer + RESIDUAL_A)
        if left is None or right is None:
            raise AdapterError(f"residual of {layer[:200]!r}: one of its two factors is missing.")
        pairs[layer] = left, right
    return pairs


def _layers(names: Iterable[str]) -> list[str]:
    return sorted({name.removesuffix(RESIDUAL_A).removesuffix(RESIDUAL_B) for name in names})


def _check_pair(
    layer: str,
    left: tuple[int, ...],
    right: tuple[int, ...],
    schema: Mapping[str, tuple[int, ...]],
    rank: int | None,
) -> None:
    a, b = schema.get(layer + LORA_A, ()), schema.get(layer + LORA_B, ())
    if rank == 0 or len(a) != 2 or len(b) != 2:
        raise AdapterError(
            f"residual of {layer[:200]!r}: the run's rule changes no such layer of the base in this round."
        )
    most = min(a[1], b[0], a[1] if rank is None else rank)
    if len(left) != 2 or len(right) != 2 or (left[0], right[1], left[1]) != (b[0], a[1], right[0]):
        raise AdapterError(
            f"residual of {layer}: shapes {list(left)} and {list(right)} are no factors of a "
            f"{b[0]} x {a[1]} weight."
        )
    if not 1 <= right[0] <= most:
        raise AdapterError(f"residual of {layer} has rank {right[0]}; in this round it is 1 to {most}.")
