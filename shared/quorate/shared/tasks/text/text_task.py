"""What tasks on texts have in common: tokenising, padding, and noise on training texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from quorate.shared.errors import ModelError
from quorate.shared.tasks.task import Batch, Example, Kind, Row, TargetTask, Task
from quorate.shared.tasks.text.sequences import stretched

SPECIAL = "special_tokens_mask"


class TextTask(Task):
    """A task whose input is one text a row."""

    max_length: int = Field(128, ge=4)
    """Longer texts are cut to this many tokens."""
    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a training text's tokens that are replaced by the tokenizer's mask (or unknown) token, drawn
    anew each time the text is seen; special tokens are kept."""

    def prepare_processor(self, processor: Any, base: Any, pad_token: str | None, name: str) -> Any:
        """Give the tokenizer a pad token, and check that `max_length` fits the model."""
        # Without a vocabulary transformers makes a tokenizer to which every word is unknown.
        if processor.vocab_size <= len(processor.all_special_tokens):
            raise ModelError(f"{name} holds no vocabulary (tokenizer.json); put the model's tokenizer there.")
        set_pad_token(processor, base, pad_token, name)
        check_length(self.max_length, processor, base, name, "task.max_length")
        self._check_noise(processor, name)
        return processor

    def _check_noise(self, processor: Any, name: str) -> None:
        if self.token_dropout and _noise_token(processor) is None:
            raise ModelError(
                f"task.token_dropout: the tokenizer of {name} has neither a mask nor an unknown token to put "
                "in a dropped token's place; leave it out."
            )

    def augment(
        self, examples: Sequence[Example], draw: np.random.Generator, processor: Any
    ) -> list[Example]:
        """Replace a share of the tokens, drawn for each example anew."""
        if not self.token_dropout:
            return list(examples)
        return [self._noisy(example, draw, _noise_token(processor)) for example in examples]

    def _noisy(self, example: Example, draw: np.random.Generator, noise: int | None) -> Example:
        ids, special = example.features["input_ids"], example.features[SPECIAL]
        dropped = draw.random(len(ids)) < self.token_dropout
        changed = [noise if d and not s else i for i, s, d in zip(ids, special, dropped, strict=True)]
        return replace(example, features={**example.features, "input_ids": changed})

    def length(self, example: Example) -> int:
        return len(example.features["input_ids"])

    def longest(self, example: Example) -> Example:
        """Return the example with its tokens over and over, up to max_length."""
        features = {name: stretched(values, self.max_length) for name, values in example.features.items()}
        return replace(example, features=features)


class TextTargetTask(TextTask, TargetTask):
    """A task on texts with one target a row; a class beside it says what the target is."""

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {"text": "text", "label": self.label_kind}

    def encode(self, rows: Sequence[Row], processor: Any, *, labelled: bool = True) -> list[Example]:
        """Tokenise `text` (cut to max_length, not padded) and read the target."""
        targets = [self.target(row) if labelled else self.blank_target for row in rows]
        if not rows:
            return []
        encoded = processor(
            [row.values["text"] for row in rows],
            truncation=True,
            max_length=self.max_length,
            return_special_tokens_mask=self.token_dropout > 0,
        )
        features = [{name: encoded[name][index] for name in encoded} for index in range(len(rows))]
        return [Example(each, target) for each, target in zip(features, targets, strict=True)]

    def collate(self, examples: Sequence[Example], processor: Any, length: int | None = None) -> Batch:
        inputs = padded(examples, processor, length)
        targets = torch.tensor([e.target for e in examples])
        weights = torch.tensor([e.weight for e in examples], dtype=torch.float32)
        return Batch(inputs, targets, weights)


def padded(examples: Sequence[Example], processor: Any, length: int | None) -> dict[str, Tensor]:
    """Return the examples' features, name -> [rows, tokens], padded to `length` or the longest of them."""
    names = [name for name in examples[0].features if name != SPECIAL]
    return dict(
        processor.pad(
            {name: [example.features[name] for example in examples] for name in names},
            padding="longest" if length is None else "max_length",
            max_length=length,
            return_tensors="pt",
        )
    )


def _noise_token(processor: Any) -> int | None:
    token: int | None = processor.mask_token_id
    unknown: int | None = processor.unk_token_id
    return unknown if token is None else token


def set_pad_token(processor: Any, base: Any, pad_token: str | None, name: str) -> None:
    """Give the tokenizer the run's pad token, and the model's configuration the id of it.

    Raises: ModelError: the token is not in the vocabulary, or there is none.
    """
    if pad_token is not None:
        known = processor.convert_tokens_to_ids(pad_token) not in (None, processor.unk_token_id)
        if not known and pad_token != processor.unk_token:
            raise ModelError(
                f"model.pad_token {pad_token!r} is not in the tokenizer's vocabulary; "
                f"name one of its special tokens: {', '.join(processor.all_special_tokens)}."
            )
        processor.pad_token = pad_token
    if processor.pad_token is None:
        raise ModelError(
            f"{name}: the tokenizer has no pad token, so texts cannot be batched; set model.pad_token "
            f"(its special tokens: {', '.join(processor.all_special_tokens) or 'none'})."
        )
    base.config.pad_token_id = processor.pad_token_id


def check_length(asked: int, processor: Any, base: Any, name: str, field: str) -> None:
    """Raise ModelError where `asked` tokens are more than the model has positions."""
    # RoBERTa's first positions are never used, which its tokenizer alone knows.
    limits = (getattr(base.config, "max_position_embeddings", None), processor.model_max_length)
    limit = min(limit for limit in limits if limit is not None)
    if asked > limit:
        message = f"{field} {asked} is above the {limit} positions of {name}; lower it."
        raise ModelError(message, kind="above-positions")
