"""Causal language models: supervised fine-tuning on completions, conversations or plain texts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, StringConstraints, model_validator
from torch import Tensor

from quorate.shared.errors import DataError, ModelError, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.tasks.task import Batch, Example, Kind, Metrics, Row, Task
from quorate.shared.tasks.text.sequences import (
    IGNORED,
    apart,
    bins,
    count_learnt,
    cut,
    joined,
    nll,
    stretched,
)
from quorate.shared.tasks.text.text_task import check_length, set_pad_token
from quorate.shared.tasks.text.tokenizing import Format, Tokenizing

_COLUMNS: Mapping[str, Mapping[str, Kind]] = {
    "prompt_completion": {"prompt": "text", "completion": "text"},
    "messages": {"messages": "messages"},
    "text": {"text": "text"},
}


class CausalLM(Task):
    """Teach a language model to answer. Columns: `prompt` and `completion`, or `messages`, or `text`.

    An example without a target is a prompt: `forward` then generates, and `predictions` is the answer's text.
    """

    default_metric: ClassVar[str] = "loss"
    counts_tokens: ClassVar[bool] = True
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    name: Literal["causal_lm"]
    """The task."""
    format: Format = "prompt_completion"
    """What a row is: a prompt and its completion, which alone is learnt; a conversation, written by the
    tokenizer's chat template, of which the assistant's turns are learnt; or a text, learnt whole."""
    prompt_suffix: Annotated[str, StringConstraints(max_length=1000)] = "\n"
    """Written between prompt and completion; not for conversations, whose template does that."""
    max_length: int = Field(512, ge=8)
    """Longer rows are cut to this many tokens: first a prompt, from its left, but not below a quarter of it;
    then the end."""
    loss_weighting: Literal["tokens", "examples"] = "tokens"
    """What counts the same in a site's loss: each learnt token, as in Hugging Face, or each row."""
    packing: bool = False
    """Train several rows in one sequence of up to max_length tokens, without one seeing the other. A batch
    size then counts such sequences. Evaluations are never packed."""
    sample_prompts: tuple[Annotated[str, StringConstraints(min_length=1, max_length=4000)], ...] = Field(
        (), max_length=16
    )
    """Public prompts whose answers, by base model and by adapter, a simulation shows in the report. They are
    in the run file, so never take them from a site's rows."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer that is generated [tokens], for sample_prompts and by `quorate predict`."""

    @model_validator(mode="after")
    def _leaves_room_for_a_prompt(self) -> Self:
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in max_length "
                f"{self.max_length}; lower it or raise max_length"
            )
        return self

    @property
    def columns(self) -> Mapping[str, Kind]:
        return _COLUMNS[self.format]

    @property
    def metrics_for_best_model(self) -> tuple[str, ...]:
        return ("loss", "perplexity", "token_accuracy")

    @property
    def mixes_rows(self) -> str | None:
        """Name packing, and weights against the site's mean."""
        if self.packing:
            return "task.packing trains several rows as one sequence; set it to false"
        if self.loss_weighting == "tokens":
            return (
                "task.loss_weighting tokens weighs a row against the mean length of the site's other rows; "
                "use examples"
            )
        return None

    def model_kwargs(self) -> dict[str, Any]:
        """Return nothing: the model comes with its head."""
        return {}

    def prepare_processor(self, processor: Any, base: Any, pad_token: str | None, name: str) -> Any:
        """Check tokenizer and model; pad with the end-of-text token where there is no other.

        Padding is masked and never learnt, so which token it is changes nothing.
        """
        if processor.pad_token is None and pad_token is None:
            processor.pad_token = processor.eos_token
        set_pad_token(processor, base, pad_token, name)
        check_length(self.max_length, processor, base, name, "task.max_length")
        if self.format == "messages" and not processor.chat_template:
            raise ModelError(
                f"{name}: the tokenizer has no chat template, which task.format messages needs; take a chat "
                "model's tokenizer, or write prompt and completion columns (task.format: prompt_completion).",
                kind="no-chat-template",
            )
        if self.packing:
            self._check_packing(base, name)
        return processor

    def _check_packing(self, base: Any, name: str) -> None:
        """Prove on the model itself that it keeps packed sequences apart.

        Raises: ModelError: it does not; state-space layers, for example, know no mask.
        """
        window = getattr(base.config, "sliding_window", None)
        able = "position_ids" in inspect.signature(base.forward).parameters
        if able and (window is None or window >= self.max_length):
            ids = [list(range(3, 8)), list(range(5, 9))]
            alone = [Example({"input_ids": each, "lengths": [len(each)]}, each) for each in ids]
            with torch.inference_mode():
                whole = self.forward(base, self._collated([joined(alone)], 0).to(base.device))[0]
                parts = [self.forward(base, self._collated([each], 0).to(base.device))[0] for each in alone]
            difference = float((whole - torch.cat(parts)).abs().max())
            if difference <= 1e-3 * max(1.0, float(whole.abs().max())):
                return
        raise ModelError(
            f"task.packing: {name} ({type(base).__name__}) does not keep packed rows apart; set it to false."
        )

    def encode(self, rows: Sequence[Row], processor: Any, *, labelled: bool = True) -> list[Example]:
        """Tokenise rows and cut them to max_length; without labels, a column `text` holds a prompt.

        Raises: DataError: naming a row that leaves nothing to learn.
        """
        if not rows:
            return []
        if not labelled:
            room = self.max_length - self.max_new_tokens
            prompts = self._tokenizing(processor).prompts([row.values["text"] for row in rows])
            # The end of a prompt is what an answer follows on, so a long one loses its beginning.
            return [
                Example({"input_ids": ids[-room:], "lengths": [min(room, len(ids))]}, None) for ids in prompts
            ]
        examples = []
        for row, (ids, labels) in zip(rows, self._tokenizing(processor).sequences(rows), strict=True):
            if all(label == IGNORED for label in labels):
                raise DataError(
                    f"{row.source}: there is nothing to learn in this row: no completion, assistant turn or "
                    "text of at least one token; fill it in or remove the row.",
                    kind="nothing-to-learn",
                )
            short, labels = cut(ids, labels, self.max_length, processor.bos_token_id)
            features = {"input_ids": short, "lengths": [len(short)], "cut": int(len(short) < len(ids))}
            examples.append(Example(features, labels))
        return examples

    def _tokenizing(self, processor: Any) -> Tokenizing:
        return Tokenizing(processor, self.format, self.prompt_suffix)

    def notes(self, rows: Sequence[Row], examples: Sequence[Example]) -> tuple[str, ...]:
        """Say how many rows were cut and how many sequences were packed."""
        found, total = [], self.num_rows(examples)
        if shortened := sum(example.features["cut"] for example in examples):
            found.append(f"{shortened} of {total} training rows were cut to {self.max_length} tokens")
        if self.packing:
            found.append(f"{total} training rows were packed into {len(examples)} sequences")
        return tuple(found)

    def pack(self, examples: Sequence[Example]) -> list[Example]:
        """Join examples into sequences of up to max_length tokens where packing is on."""
        if not self.packing:
            return list(examples)
        rows = bins([self.length(example) for example in examples], self.max_length)
        return [joined([examples[index] for index in row]) for row in rows]

    def num_rows(self, examples: Sequence[Example]) -> int:
        return sum(len(example.features["lengths"]) for example in examples)

    def num_tokens(self, examples: Sequence[Example]) -> int:
        return sum(count_learnt(example.target) for example in examples)

    def weigh(self, examples: Sequence[Example]) -> list[Example]:
        """Weigh each example by its learnt tokens (or by its rows, where packed) against this site's mean."""
        by_tokens = self.loss_weighting == "tokens"
        sizes = [count_learnt(e.target) if by_tokens else len(e.features["lengths"]) for e in examples]
        mean = sum(sizes) / max(len(sizes), 1)
        return [replace(e, weight=size / mean) for e, size in zip(examples, sizes, strict=True)]

    def length(self, example: Example) -> int:
        return len(example.features["input_ids"])

    def longest(self, example: Example) -> Example:
        """Return the example with its tokens over and over, up to max_length."""
        ids = stretched(example.features["input_ids"], self.max_length)
        features = {**example.features, "input_ids": ids, "lengths": [len(ids)]}
        return replace(example, features=features, target=stretched(example.target, self.max_length))

    def collate(self, examples: Sequence[Example], processor: Any, length: int | None = None) -> Batch:
        """Pad to `length`, or to the longest: at the right.

        Bare prompts are padded at the left, to the longest, for answers follow at the right.
        """
        pad = processor.pad_token_id
        if examples[0].target is not None:
            return self._collated(examples, pad, length)
        width = max(map(self.length, examples))
        ids = [[pad] * (width - self.length(e)) + list(e.features["input_ids"]) for e in examples]
        mask = [[0] * (width - self.length(e)) + [1] * self.length(e) for e in examples]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return Batch(inputs, None, torch.ones(len(examples)))

    def _collated(self, examples: Sequence[Example], pad: int, width: int | None = None) -> Batch:
        """Return a batch with per-token loss weights [rows, tokens] that sum to each example's weight."""
        width = width or max(map(self.length, examples))
        shape = (len(examples), width)
        ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
        weights = torch.zeros(shape)
        for row, example in enumerate(examples):
            size = self.length(example)
            ids[row, :size] = torch.tensor(example.features["input_ids"])
            labels[row, :size] = torch.tensor(example.target)
            weights[row, :size] = self._token_weights(example)
        lengths = [example.features["lengths"] for example in examples]
        inputs = {"input_ids": ids}
        if all(len(parts) == 1 for parts in lengths):
            inputs["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)).long()
        else:
            inputs["position_ids"], inputs["attention_mask"] = apart(lengths, width)
        return Batch(inputs, labels, weights)

    def _token_weights(self, example: Example) -> Tensor:
        taught = (torch.tensor(example.target) != IGNORED).float()
        parts = list(torch.split(taught, list(example.features["lengths"])))
        if self.loss_weighting == "tokens":
            parts = [taught]
        each = [part / (part.sum().clamp(min=1) * len(parts)) for part in parts]
        assert isinstance(example.weight, int | float)
        return example.weight * torch.cat(each)

    def forward(self, model: Any, batch: Batch) -> Any:
        """Return logits [rows, tokens, vocabulary]; for bare prompts the ids with a greedy answer behind."""
        if batch.targets is not None:
            return model(**batch.inputs, use_cache=False).logits
        from transformers import GenerationConfig  # not above: run files are read without transformers

        ends = model.generation_config.eos_token_id  # a chat model may end a turn with several tokens
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=model.config.eos_token_id if ends is None else ends,
            pad_token_id=model.config.pad_token_id,
        )
        return model.generate(**batch.inputs, generation_config=settings)

    def loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return the weighted mean over each row's learnt tokens of -log p, [rows]."""
        return (nll(logits, batch) * batch.weights[:, 1:]).sum(dim=1)

    def measured_loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return the sum over each row's learnt tokens of -log p, [rows]."""
        return nll(logits, batch).sum(dim=1)

    def outcomes(self, logits: Any, batch: Batch) -> npt.NDArray[np.int64]:
        """Return for each learnt token whether it was the likeliest one, [tokens, 1]."""
        labels = batch.targets[:, 1:]
        right = (logits[:, :-1].argmax(dim=-1) == labels)[labels != IGNORED]
        return np.asarray(right[:, None].cpu().numpy(), dtype=np.int64)

    def check_outcomes(self, outcomes: Outcomes) -> None:
        """Raise ProtocolError unless outcomes are right or wrong, from one to max_length for each row."""
        most = outcomes.rows * self.max_length
        known = all(value in ((0,), (1,)) for value in outcomes.values)
        if not known or not outcomes.rows <= outcomes.units <= most:
            message = "sent outcomes that are not right or wrong tokens of rows, as this task has them."
            raise ProtocolError(message)

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Return loss and perplexity per token, and the share of tokens that were the likeliest ones."""
        if not outcomes.units:
            return {}
        loss = outcomes.loss_sum / outcomes.units
        right = dict(zip(outcomes.values, outcomes.counts, strict=True)).get((1,), 0)
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": right / outcomes.units,
        }

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.sample_prompts

    def samples(self, model: Any, processor: Any) -> list[tuple[str, str]]:
        answers = []
        for prompt in self.sample_prompts:  # one by one: nothing is padded
            examples = self.encode([Row({"text": prompt}, "task.sample_prompts")], processor, labelled=False)
            batch = self.collate(examples, processor).to(model.device)
            with torch.inference_mode():
                ids = self.forward(model, batch)
            answers.append((prompt, self.predictions(ids, batch, processor)[0]["completion"]))
        return answers

    def predictions(self, logits: Any, batch: Batch, processor: Any) -> list[dict[str, Any]]:
        """Return each prompt's completion, from the ids that `forward` generated."""
        written = logits[:, batch.inputs["input_ids"].shape[1] :]
        return [{"completion": text} for text in processor.batch_decode(written, skip_special_tokens=True)]
