"""Token dropout: how much it changes, what it never touches, and that it is each site's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from quorate.client.trainer.evaluate import evaluate
from quorate.client.trainer.fit import SiteTask, fit
from quorate.client.trainer.stack import AdapterStack
from quorate.shared.model.lora_model import load_model
from quorate.shared.progress import ignore_step
from quorate.shared.seeds import rng

SHARE = 0.3


def test_it_replaces_about_the_stated_share_and_no_special_token(make_run: Any, make_sites: Any) -> None:
    run = make_run(task={"token_dropout": SHARE})
    processor = load_model(run).processor
    examples = run.task.encode(make_sites(a=400)["a"]["train"], processor)
    noisy = run.task.augment(examples, rng(0, "draw"), processor)
    changed = words = 0
    for before, after in zip(examples, noisy, strict=True):
        assert after.target == before.target and after.weight == before.weight
        old, new = before.features["input_ids"], after.features["input_ids"]
        assert len(old) == len(new) and before.features["attention_mask"] == after.features["attention_mask"]
        for was, now in zip(old, new, strict=True):
            if was in processor.all_special_ids:
                assert now == was, "[CLS] and [SEP] stay"
                continue
            words += 1
            if now != was:
                assert now == processor.mask_token_id
                changed += 1
    # 3,000 draws or more: the standard error of the share is below 0.009.
    assert words > 3000 and abs(changed / words - SHARE) < 0.03
    again = run.task.augment(examples, rng(0, "draw"), processor)
    assert [e.features for e in again] == [e.features for e in noisy]
    other = run.task.augment(examples, rng(1, "draw"), processor)
    assert [e.features for e in other] != [e.features for e in noisy]
    off = make_run().task
    assert off.augment(examples, rng(0, "draw"), processor) == examples


def test_stacked_sites_are_sites_alone_and_evaluation_sees_no_noise(make_run: Any, make_sites: Any) -> None:
    run, plain = make_run(task={"token_dropout": SHARE}), make_run()
    sites = {name: site["train"] for name, site in make_sites(a=12, b=3).items()}
    model = load_model(run)
    stack = AdapterStack.install(model)

    def train(of: Any, names: list[str]) -> list[Any]:
        tasks = [SiteTask(n, of.task.encode(sites[n], model.processor), model.initial) for n in names]
        return [f.adapter for f in fit(stack, of, 1, tasks, frozenset(model.initial), ignore_step)]

    together = train(run, ["a", "b"])
    for name, stacked in zip(sites, together, strict=True):
        (alone,) = train(run, [name])
        assert max(float(np.abs(stacked[n] - alone[n]).max()) for n in alone) < 1e-5
    (dry,) = train(plain, ["a"])
    assert max(float(np.abs(dry[n] - together[0][n]).max()) for n in dry) > 1e-4, "training saw noise"

    figures = [
        evaluate(stack, each, dry, each.task.encode(sites["a"], model.processor))
        for each in (run, plain, run)
    ]
    assert figures[0] == figures[1] == figures[2]
