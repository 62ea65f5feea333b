"""Token classification: named entities in sentences that are split into words.

An entity is a run of words of one type, read from tags as conlleval and seqeval's default mode read them
(https://github.com/chakki-works/seqeval); what is measured are whole entities, of which type and both ends
must be right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from quorate.shared.errors import DataError, ModelError, ProtocolError
from quorate.shared.metrics.entity_counts import check_products, ratios, sums_of_products, unit_counts
from quorate.shared.metrics.intervals import MeanOfRatios, UnitCounts
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.tasks.classification import DIFFER, Label, label_kwargs
from quorate.shared.tasks.task import Batch, Example, Kind, Metrics, Row
from quorate.shared.tasks.text.text_task import TextTask, padded
from quorate.shared.tasks.text.words import CUT, NO_PIECE, Words, places_of, split_text

OUTSIDE = "O"
IGNORED = -100
"""Target of a piece that carries no label: torch's own."""
RIGHT, WRONG, MISSED = range(3)
"""An entity's outcome: found, found where there is none, there and not found."""
_TAG = re.compile(r"([BIES])-(.+)", re.DOTALL)


class TokenClassification(TextTask):
    """Find entities. Columns: `tokens` (a list of words) and `ner_tags` (a tag for each)."""

    default_metric: ClassVar[str] = "f1"
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    class_name: ClassVar[str] = "entity type"
    unit_name: ClassVar[str] = "entities"

    name: Literal["token_classification"]
    """The task."""
    labels: Annotated[tuple[Label, ...], Field(min_length=2), DIFFER]
    """Tags, in the order of their ids: O; for each type of entity B-TYPE, I-TYPE, and also E-TYPE, S-TYPE."""
    class_weights: Literal["none", "balanced"] = "none"
    """Loss weight per tag: none; or balanced, from how often each tag occurs among the site's own words."""

    @field_validator("labels")
    @classmethod
    def _labels_are_tags(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if OUTSIDE not in labels:
            raise ValueError("label 'O' is missing, the tag of words outside of entities")
        for label in labels:
            if label != OUTSIDE and not _TAG.fullmatch(label):
                raise ValueError(
                    f"label {label!r} is not a tag; write O, B-TYPE and I-TYPE (BIO), with E-TYPE and S-TYPE "
                    "for the last and the only word of an entity (IOBES; others call them L and U)"
                )
        return labels

    @property
    def types(self) -> tuple[str, ...]:
        """Types of entities, in the order of the labels."""
        return tuple(dict.fromkeys(kind for _, kind in self._parts if kind))

    @property
    def _parts(self) -> list[tuple[str, str]]:
        """Prefix and type of each label; O has no type."""
        found = [_TAG.fullmatch(label) for label in self.labels]
        return [(tag[1], tag[2]) if tag else (OUTSIDE, "") for tag in found]

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {"tokens": "tokens", "ner_tags": "tags"}

    @property
    def metrics_for_best_model(self) -> tuple[str, ...]:
        return ("f1", "macro_f1", "precision", "recall")

    @property
    def mixes_rows(self) -> str | None:
        """Name weights from the site's counts."""
        if self.class_weights == "balanced":
            return "task.class_weights balanced weighs a row by the counts of the site's other rows; use none"
        return None

    def model_kwargs(self) -> dict[str, Any]:
        return label_kwargs(self.labels)

    def prepare_processor(self, processor: Any, base: Any, pad_token: str | None, name: str) -> Any:
        """Check that the tokenizer can say which word a piece is of, and let it see spaces before words."""
        if not processor.is_fast:
            raise ModelError(
                f"{name}: its tokenizer is a slow one, which cannot say which word a piece belongs to; "
                "convert it (the model's folder needs a tokenizer.json)."
            )
        before = processor.backend_tokenizer.pre_tokenizer
        if getattr(before, "add_prefix_space", True) is False:
            # Else a byte-level tokenizer cuts every word as if it stood at the start of a text.
            before.add_prefix_space = True
        processor.truncation_side = "right"  # `places_of` takes what is cut off to be at the end
        return super().prepare_processor(processor, base, pad_token, name)

    def encode(self, rows: Sequence[Row], processor: Any, *, labelled: bool = True) -> list[Example]:
        """Cut words into pieces; the first piece of each carries its tag.

        Rows without labels hold `tokens`, or a `text` that is split here: letters and digits that stand
        together are a word, and so is any other character but white space.
        """
        read = [self._labelled(row) if labelled else _unlabelled(row.values) for row in rows]
        if not read:
            return []
        encoded = processor(
            [tokens for tokens, _ in read],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            return_special_tokens_mask=self.token_dropout > 0,
        )
        return [
            Example(
                {name: encoded[name][index] for name in encoded},
                replace(words, places=places_of(encoded, index, len(tokens))),
            )
            for index, (tokens, words) in enumerate(read)
        ]

    def _labelled(self, row: Row) -> tuple[list[str], Words]:
        tokens, tags = row.values["tokens"], row.values["ner_tags"]
        if not tokens:
            raise DataError(f"{row.source}: the row has no words; remove it.")
        if len(tokens) != len(tags):
            raise DataError(
                f"{row.source}: {len(tokens)} tokens but {len(tags)} ner_tags; give one tag for each word."
            )
        if not all(isinstance(tag, int) and 0 <= tag < len(self.labels) for tag in tags):
            raise DataError(f"{row.source}: a tag is not a label's id in 0..{len(self.labels) - 1}.")
        return list(tokens), Words(tuple(tags))

    def notes(self, rows: Sequence[Row], examples: Sequence[Example]) -> tuple[str, ...]:
        """Say how many words the model does not see."""
        places = [place for example in examples for place in example.target.places]
        notes = []
        if cut := places.count(CUT):
            rows_cut = sum(CUT in example.target.places for example in examples)
            notes.append(
                f"{cut} of {len(places)} words, in {rows_cut} of {len(examples)} training rows, lie beyond "
                f"max_length {self.max_length}: the model does not see them, entities there count as missed"
            )
        if dropped := places.count(NO_PIECE):
            notes.append(f"{dropped} of {len(places)} words are nothing to the tokenizer; they count as O")
        return tuple(notes)

    def weigh(self, examples: Sequence[Example]) -> list[Example]:
        """Give each example the loss weight of each tag; their mean over the site's labelled pieces is 1."""
        tags = [t for e in examples for t, p in zip(e.target.tags, e.target.places, strict=True) if p >= 0]
        if self.class_weights == "none" or not tags:
            return list(examples)
        counts = np.bincount(tags, minlength=len(self.labels))
        weights = len(tags) / (np.count_nonzero(counts) * np.maximum(counts, 1))
        return [replace(example, weight=tuple(weights.tolist())) for example in examples]

    def label_counts(self, examples: Sequence[Example]) -> dict[str, int]:
        """Count the examples in which each type of entity occurs."""
        counts = dict.fromkeys(self.types, 0)
        for example in examples:
            for index in {kind for kind, _, _ in self.entities(example.target.tags)}:
                counts[self.types[index]] += 1
        return counts

    def collate(self, examples: Sequence[Example], processor: Any, length: int | None = None) -> Batch:
        """Pad to `length`, or to the longest.

        Targets: `pieces`, label ids [rows, pieces], and `words`, one Words a row.
        """
        inputs = padded(examples, processor, length)
        rows, width = inputs["input_ids"].shape
        pieces = torch.full((rows, width), IGNORED)
        words = []
        for row, example in enumerate(examples):
            shift = width - self.length(example) if processor.padding_side == "left" else 0
            places = tuple(place + shift if place >= 0 else place for place in example.target.places)
            words.append(replace(example.target, places=places))
            for place, tag in zip(places, example.target.tags, strict=True):
                if place >= 0:
                    pieces[row, place] = tag
        weights = torch.tensor([e.weight for e in examples], dtype=torch.float32)
        return Batch(inputs, {"pieces": pieces, "words": words}, weights)

    def loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return weighted cross-entropy, the mean over each row's own labelled pieces, [rows]."""
        pieces, weights = batch.targets["pieces"], batch.weights
        each = functional.cross_entropy(
            logits.float().transpose(1, 2), pieces, reduction="none", ignore_index=IGNORED
        )
        each = each * (weights.gather(1, pieces.clamp(min=0)) if weights.ndim == 2 else weights[:, None])
        # A row without any labelled piece has no loss, instead of 0 / 0.
        mean: Tensor = each.sum(dim=1) / (pieces != IGNORED).sum(dim=1).clamp(min=1)
        return mean

    def entities(self, tags: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield (type index, first word, word after the last) of each entity.

        One begins at B or S, after E or S, after O, and where the type changes, whatever the tag: tags that
        no scheme allows, such as I after O, are read as conlleval reads them.
        """
        parts, types, begin = self._parts, self.types, 0
        before, kind = OUTSIDE, ""
        for index, tag in enumerate((*tags, self.labels.index(OUTSIDE))):
            prefix, new = parts[tag]
            same = kind == new and prefix in "IE" and before in "BI"
            if kind and not same:
                yield types.index(kind), begin, index
            begin = begin if kind and same else index
            before, kind = prefix, new

    def outcomes(self, logits: Any, batch: Batch) -> npt.NDArray[np.int64]:
        """Return (type index, RIGHT, WRONG or MISSED) of each entity that is there or was found, [n, 2]."""
        found = [each for row in self._found(logits, batch) for each in row]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def _found(self, logits: Any, batch: Batch) -> Iterator[list[tuple[int, int]]]:
        """Yield the outcomes of each row."""
        outside = self.labels.index(OUTSIDE)
        for row, words in zip(logits.argmax(dim=-1).tolist(), batch.targets["words"], strict=True):
            truth = set(self.entities(words.tags))
            said = set(self.entities([row[place] if place >= 0 else outside for place in words.places]))
            groups = ((RIGHT, truth & said), (WRONG, said - truth), (MISSED, truth - said))
            yield [(entity[0], kind) for kind, group in groups for entity in group]

    def sums(self, logits: Any, batch: Batch) -> dict[str, float]:
        """Return sums over rows of the products of two counts, of which a row has three for each type.

        See `quorate.shared.metrics.entity_counts`.
        """
        return sums_of_products(self._found(logits, batch), len(self.types))

    def check_outcomes(self, outcomes: Outcomes) -> None:
        """Raise ProtocolError unless outcomes are pairs of a type of entity and what became of it."""
        for value in outcomes.values:
            if len(value) != 2 or not (0 <= value[0] < len(self.types) and RIGHT <= value[1] <= MISSED):
                raise ProtocolError("sent outcomes that are not (type of entity, right, wrong or missed).")
        check_products(outcomes, len(self.types))

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Return precision, recall and f1 over all entities, macro_f1 over types, loss, and per_class.

        As in seqeval, a rate without anything to count is 0, and a type that occurs in neither truth nor
        answers does not enter the macro average.
        """
        if not outcomes.rows:
            return {}
        table = np.zeros((len(self.types), 3), dtype=np.int64)
        for (kind, what), count in zip(outcomes.values, outcomes.counts, strict=True):
            table[kind, what] += count
        present = table.sum(axis=1) > 0
        precision, recall, f1 = _rates(table)
        total = [float(rate) for rate in _rates(table.sum(axis=0))]
        return {
            **dict(zip(("precision", "recall", "f1"), total, strict=True)),
            "macro_f1": float(f1[present].mean()) if present.any() else 0.0,
            "loss": outcomes.loss_sum / outcomes.rows,
            "per_class": {
                kind: {
                    "precision": float(precision[index]),
                    "recall": float(recall[index]),
                    "f1": float(f1[index]),
                    "support": int(table[index, RIGHT] + table[index, MISSED]),
                }
                for index, kind in enumerate(self.types)
            },
        }

    def ratios(self, outcomes: Outcomes) -> dict[str, MeanOfRatios]:
        """Return precision, recall and f1, and macro_f1; a row (a sentence) is a unit."""
        return ratios(len(self.types)) if outcomes.sums else {}  # else no entity is there, nor was one found

    def unit_counts(self, outcomes: Outcomes) -> UnitCounts:
        """Return what sentences count: for each type its right, wrong and missed entities."""
        return unit_counts(outcomes, len(self.types))

    def predictions(self, logits: Any, batch: Batch, processor: Any) -> list[dict[str, Any]]:
        """Return each text's entities with their words' mean probability, and how many words were cut off."""
        chances, best = logits.float().softmax(dim=-1).max(dim=-1)
        outside = self.labels.index(OUTSIDE)
        shown: list[dict[str, Any]] = []
        for row, chance, words in zip(best.tolist(), chances.tolist(), batch.targets["words"], strict=True):
            said = [row[place] if place >= 0 else outside for place in words.places]
            entities = []
            for kind, first, after in self.entities(said):
                start, end = words.spans[first][0], words.spans[after - 1][1]
                score = float(np.mean([chance[place] for place in words.places[first:after]]))
                entities.append(
                    {
                        "type": self.types[kind],
                        "text": words.text[start:end],
                        "start": start,
                        "end": end,
                        "score": score,
                    }
                )
            shown.append({"entities": entities, "words_cut": words.places.count(CUT)})
        return shown


def _unlabelled(values: Mapping[str, Any]) -> tuple[list[str], Words]:
    """Return a row's words, or those of its text."""
    if "tokens" not in values:
        return split_text(values["text"])
    tokens = list(values["tokens"])
    ends = np.cumsum([len(token) + 1 for token in tokens]).tolist()
    spans = tuple((end - 1 - len(token), end - 1) for token, end in zip(tokens, ends, strict=True))
    return tokens, Words((0,) * len(tokens), text=" ".join(tokens), spans=spans)


def _rates(counts: npt.NDArray[np.int64]) -> tuple[Any, Any, Any]:
    """Return precision, recall and F1 of counts [..., (right, wrong, missed)]; 0 where there is none."""
    right, wrong, missed = np.moveaxis(counts, -1, 0)
    return (
        right / np.maximum(right + wrong, 1),
        right / np.maximum(right + missed, 1),
        2 * right / np.maximum(2 * right + wrong + missed, 1),
    )
