"""From the rows of a causal language model's task to token ids and labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from quorate.shared.errors import DataError, ModelError
from quorate.shared.tasks.task import Row
from quorate.shared.tasks.text.sequences import Ids, learnt

Format = Literal["prompt_completion", "messages", "text"]
Message = Mapping[str, str]
_MARKED = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Tokenizing:
    """How rows of a format become token ids.

    Args:
        processor: the tokenizer.
        format: what a row is.
        suffix: between prompt and completion.
    """

    processor: Any
    format: Format
    suffix: str

    @property
    def end(self) -> Ids:
        """The end-of-text token, where the tokenizer has one."""
        return [] if self.processor.eos_token_id is None else [self.processor.eos_token_id]

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids that an answer to each text follows on."""
        if self.format == "messages":
            asked = [[{"role": "user", "content": text}] for text in texts]
            template = self.processor.apply_chat_template
            return [
                list(template(e, add_generation_prompt=True, return_dict=True)["input_ids"]) for e in asked
            ]
        return self._open([text + self.suffix for text in texts] if self.format != "text" else texts)

    def sequences(self, rows: Sequence[Row]) -> list[tuple[Ids, Ids]]:
        """Return the ids and labels of each row, uncut; no label is set where there is nothing to learn.

        Raises: DataError, ModelError: see `conversation`.
        """
        if self.format == "messages":
            return [conversation(row.values["messages"], self.processor, row.source) for row in rows]
        if self.format == "text":
            texts = self._open([row.values["text"] for row in rows])
            return [(ids + self.end, learnt([1] * len(ids + self.end), ids + self.end)) for ids in texts]
        prompts = self.prompts([row.values["prompt"] for row in rows])
        # Each by itself, so that the border is the same when only the prompt is there.
        completions = [row.values["completion"] for row in rows]
        answers = self.processor(completions, add_special_tokens=False)["input_ids"]
        return [
            self._completed(prompt, list(answer) + self.end if answer else [])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _completed(self, prompt: Ids, answer: Ids) -> tuple[Ids, Ids]:
        return prompt + answer, learnt([0] * len(prompt) + [1] * len(answer), prompt + answer)

    def _open(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of texts, without the end-of-text token that some tokenizers put behind each."""
        found = self.processor(list(texts))["input_ids"]
        return [list(ids[:-1] if ids and ids[-1:] == self.end else ids) for ids in found]


def conversation(messages: Sequence[Message], processor: Any, source: str) -> tuple[Ids, Ids]:
    """Return a conversation as the tokenizer's chat template writes it; the assistant's turns are learnt.

    A template that marks these turns itself ({% generation %}) is taken at its word. Otherwise a turn is what
    the text gains by it, from behind the prompt for a generation to the end of the turn.

    Raises: DataError: naming the row, where the template refuses the conversation. ModelError: the template
        writes earlier turns another way once later ones follow.
    """
    try:
        if _MARKED.search(processor.get_chat_template()):
            marked = processor.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(marked["input_ids"]), learnt(marked["assistant_masks"], list(marked["input_ids"]))
        text, spans = _spans(messages, processor)
    except TemplateError:
        roles = ", ".join(message["role"] for message in messages[:12])
        raise DataError(
            f"{source}: the tokenizer's chat template refuses this conversation (roles: {roles}); "
            "bring its turns into the order that the model knows.",
            kind="turns-refused",
        ) from None  # a template's own words may quote the row
    encoded = processor(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [any(start <= at < end for start, end in spans) for at, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), learnt(mask, list(encoded["input_ids"]))


def _spans(messages: Sequence[Message], processor: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation's text, and the places of the assistant's turns in it."""

    def written(turns: Sequence[Message], prompt: bool = False) -> str:
        text: str = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        return text

    text, spans = written(messages), []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = written(messages[:at], prompt=True), written(messages[: at + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise ModelError(
                "the tokenizer's chat template writes earlier turns another way once later ones follow, so "
                "the assistant's words cannot be told apart; give conversations of one answer each, or "
                "task.format prompt_completion.",
                kind="turns-rewritten",
            )
        spans.append((len(before), len(after)))
    return text, spans
