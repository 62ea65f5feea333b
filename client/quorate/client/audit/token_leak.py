"""Does a site's update show which words it was trained on?

Every gradient of a factor A is a sum of outer products with the layer's inputs, so the rows of what A moved
by lie in the span of the inputs that were trained on, and where these are fewer than A's rows, they are it.
Below the first mixing of tokens an input is the vector of one token at one place, which anybody can compute
and hold against that span (Petrov et al. 2024, arXiv:2405.15586, for whole weights). A small rank, many
steps, the optimiser's own scaling and noise blur it: the check says how much is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quorate.client.audit.shadow_models import Shadow
from quorate.shared.adapters.adapter import LORA_A, Adapter, is_lora_a
from quorate.shared.adapters.selection import layer_index, moving
from quorate.shared.errors import QuorateError
from quorate.shared.privacy.audit.audit_record import TokenLeak
from quorate.shared.privacy.audit.membership_inference import attack, auc
from quorate.shared.progress import OnStep, ignore_step
from quorate.shared.seeds import rng
from quorate.shared.tasks.task import Row

ROUNDS = 2
"""B starts at zero, and A does not move before B did: with one step a round, not before the second."""
PLACES = 32
"""Places in a text that are tried for each token."""
FEWEST = 5
"""Fewer tokens of a kind say nothing."""
_RANK_TOLERANCE = 1e-4
"""Singular values of an update below this part of its largest are float32's rounding."""
_SAME = 1e-4
"""Inputs that differ by less, relative to their length, are the same vector."""


class NotChecked(QuorateError):
    """The check does not apply to this run; the text says why."""


def token_leaks(
    shadow: Shadow, rows: Mapping[str, Sequence[Row]], *, tokens: int, on_step: OnStep = ignore_step
) -> tuple[TokenLeak, ...]:
    """Train each site alone for up to ROUNDS rounds and hold its last update against the vocabulary.

    Args:
        rows: site -> its training rows.
        tokens: most tokens of each kind that are told apart.
        on_step: told of every optimiser step.
    Raises: NotChecked: no texts, no such factor that moves, or too few tokens.
    """
    names = _first_factors(shadow)
    before: dict[str, Adapter] = dict.fromkeys(rows, shadow.model.initial)
    after, round = before, min(ROUNDS, shadow.run.federation.rounds)
    for trained in islice(shadow.rounds(rows, on_step), round):
        before, after = after, trained
    return tuple(
        _leak(shadow, site, rows[site], before[site], after[site], names, round, tokens) for site in rows
    )


def _first_factors(shadow: Shadow) -> list[str]:
    """Return the A of the first adapted layer whose inputs are one token's each."""
    embeddings = getattr(shadow.model.peft, "get_input_embeddings", lambda: None)()
    if not isinstance(embeddings, torch.nn.Embedding):
        raise NotChecked("token leak: the model reads no tokens")
    moved = moving(shadow.run, shadow.model.initial, 1)
    factors = [name for name in shadow.model.initial if is_lora_a(name) and name in moved]
    if not factors:
        raise NotChecked("token leak: no factor A moves", kind="no-factor-moves")
    first = min(layer_index(name) or 0 for name in factors)
    ids = torch.arange(min(8, embeddings.num_embeddings)).repeat(2, 1)
    ids[1] = ids[1].flip(0)
    ids[1, -1] = ids[0, -1]  # the same token, at the same place, in another text
    inputs = _inputs(shadow, [name for name in factors if (layer_index(name) or 0) == first], ids)
    same = [name for name, each in inputs.items() if _alike(*each[:, -1])]
    if not same:
        message = "token leak: the first adapted layer sees tokens mixed with their context"
        raise NotChecked(message, kind="tokens-mixed")
    return same


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool(torch.linalg.norm(one - other) < _SAME * torch.linalg.norm(one))


def _leak(
    shadow: Shadow,
    site: str,
    rows: Sequence[Row],
    before: Adapter,
    after: Adapter,
    names: Sequence[str],
    round: int,
    most: int,
) -> TokenLeak:
    members, others, places = _tokens(shadow, site, rows, most)
    asked = torch.tensor([*members, *others])
    by_update, by_start = np.zeros(len(asked)), np.zeros(len(asked))
    for name, inputs in _inputs(shadow, names, asked[:, None].expand(-1, places)).items():
        by_update += _distances(inputs, after[name] - before[name])
        by_start += _distances(inputs, before[name])
    n = len(members)
    return TokenLeak(
        site=site,
        round=round,
        attack=attack(-by_update[:n], -by_update[n:], seed=shadow.run.seed),
        auc_before=auc(-by_start[:n], -by_start[n:]),
    )


def _tokens(shadow: Shadow, site: str, rows: Sequence[Row], most: int) -> tuple[list[int], list[int], int]:
    """Return tokens of a site's training rows, others of the vocabulary, and how many places there are."""
    examples = shadow.encode(rows)
    special = set(shadow.model.processor.all_special_ids)
    seen = {int(token) for each in examples for token in each.features["input_ids"][:PLACES]} - special
    ever = {int(token) for each in examples for token in each.features["input_ids"]}
    vocabulary = set(range(len(shadow.model.processor))) - ever - special
    if min(len(seen), len(vocabulary)) < FEWEST:
        raise NotChecked(
            f"token leak: {site} has {len(seen)} tokens in its rows and {len(vocabulary)} others; {FEWEST} "
            "of each are needed",
            kind="too-few-tokens",
        )
    draw = rng(shadow.run.seed, "audit-tokens", site)
    members, others = (
        draw.choice(sorted(kind), min(most, len(kind)), replace=False).tolist() for kind in (seen, vocabulary)
    )
    return members, others, min(PLACES, max(len(each.features["input_ids"]) for each in examples))


def _inputs(shadow: Shadow, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """Return what the layer of each factor is given for texts of token ids: name -> [texts, places, size]."""
    model, size = shadow.model.peft, shadow.run.training.per_device_eval_batch_size
    shadow.stack.load([shadow.model.initial], ())
    given: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, _module: object, arguments: tuple[Tensor, ...]) -> None:
        given[name].append(arguments[0].detach().float().cpu())

    hooks = [
        model.get_submodule(name.removesuffix(LORA_A)).register_forward_pre_hook(partial(keep, name))
        for name in names
    ]
    try:
        with torch.inference_mode():
            for some in torch.split(ids, size):
                some = some.to(model.device)
                model(input_ids=some, attention_mask=torch.ones_like(some))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(each) for name, each in given.items()}


def _distances(inputs: Tensor, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return each token's distance to the span of `rows`, relative to its length, at its nearest place, [n].

    Args:
        inputs: [n, places, size].
        rows: [rank, size]; a span of nothing is as far away from every token.
    """
    _, values, directions = torch.linalg.svd(torch.from_numpy(rows).double(), full_matrices=False)
    basis = directions[values > _RANK_TOLERANCE * values[0]] if values[0] > 0 else directions[:0]
    vectors = inputs.double() / torch.linalg.norm(inputs.double(), dim=-1, keepdim=True)
    inside = torch.square(vectors @ basis.T).sum(dim=-1)
    return np.asarray(torch.sqrt((1 - inside).clamp(min=0)).min(dim=1).values.numpy(), dtype=np.float64)
