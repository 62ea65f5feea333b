"""The token-leak check finds the words of one text in its update, and fewer of them behind steps or noise."""

from __future__ import annotations

from typing import Any

import pytest
from refusals import refuses

from quorate.client.audit.shadow_models import Shadow
from quorate.client.audit.token_leak import NotChecked, token_leaks
from quorate.shared.privacy.audit.audit_record import TokenLeak
from quorate.shared.tasks.task import Row

TEXT = "heart liver bone fever cough"
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 2, "weight_decay": 0.0}


def checked(run: Any, texts: list[str]) -> TokenLeak:
    rows = [Row({"text": text, "label": index % 3}, f"rows:{index}") for index, text in enumerate(texts)]
    (found,) = token_leaks(Shadow.of(run), {"north": rows}, tokens=100)
    return found


def test_the_words_of_one_short_text_are_found(make_run: Any) -> None:
    """Rank 8 and a text of seven tokens: each of its words is nearer to the update than any other word."""
    found = checked(make_run(adapter={"r": 8}, training=SGD), [TEXT])
    assert found.attack.auc == 1.0 and found.attack.tpr_at_low_fpr == 1.0 and found.round == 2
    assert found.attack.members == len(TEXT.split()) and found.auc_before < 1.0


def test_noise_hides_them(make_run: Any) -> None:
    privacy = {"unit": "record", "noise_multiplier": 4.0, "delta": 1e-5}
    run = make_run(adapter={"r": 8}, training={**SGD, "per_device_train_batch_size": 1}, privacy=privacy)
    found = checked(run, [TEXT] * 2)
    # Noise is secret: before training the words may by chance look like anything but members.
    assert found.attack.auc < 0.9 and found.attack.auc_interval[0] < max(found.auc_before, 0.5) + 0.2


@pytest.mark.parametrize(
    ("sections", "kind"),
    [
        ({"aggregation": {"name": "ffa"}}, "no-factor-moves"),
        ({"adapter": {"r": 4, "target_modules": ["output.dense"]}}, "tokens-mixed"),
        ({"training": {"freeze_layers": 1}}, "tokens-mixed"),
    ],
)
def test_where_it_does_not_apply_it_says_so(make_run: Any, sections: Any, kind: str) -> None:
    with refuses(NotChecked, kind):
        checked(make_run(**sections), [TEXT])


def test_too_few_words_say_nothing(make_run: Any) -> None:
    with refuses(NotChecked, "too-few-tokens") as caught:
        checked(make_run(training=SGD), ["heart liver"])
    assert " 2 tokens" in str(caught.value)
