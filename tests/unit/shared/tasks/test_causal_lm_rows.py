"""From rows to what is learnt: columns, cutting, conversations, packing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from refusals import refuses
from tiny_lm import CHATML, lm_rows, lm_run

from quorate.client.data.splits import load_splits
from quorate.server.rounds.evaluation import summarise
from quorate.server.rounds.update_checks import check_trained
from quorate.shared.adapters.adapter import Adapter
from quorate.shared.aggregation import FedAvg
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SourceConfig
from quorate.shared.errors import DataError, ModelError, ProtocolError
from quorate.shared.metrics.outcomes import Outcomes
from quorate.shared.model.base_model import load_base
from quorate.shared.protocol.messages import Update, UpdateHeader
from quorate.shared.tasks import CausalLM
from quorate.shared.tasks.task import Example, Row
from quorate.shared.tasks.text.sequences import IGNORED, LEAST_CONTEXT, bins, cut

SECRET = "Mrs Miller of 4 Mill Lane"
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}"
    "{% else %}{{ m.content }}?{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %};"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception(messages[0].content) }}{% endif %}" + CHATML


def task(**options: Any) -> CausalLM:
    return CausalLM(name="causal_lm", **{"max_length": 64, "max_new_tokens": 8, **options})


def taught(example: Example, processor: Any) -> str:
    return str(processor.decode([label for label in example.target if label != IGNORED]))


def talk(*turns: str, first: str = "user") -> Row:
    roles = [first, "assistant"] if first == "user" else [first, "user", "assistant"]
    messages = [{"role": roles[at % len(roles)], "content": turn} for at, turn in enumerate(turns)]
    return Row({"messages": messages}, "talks.jsonl:7")


def test_a_completion_is_learnt_with_its_end_and_a_prompt_is_not() -> None:
    processor = tiny_lm.tokenizer()
    (example,) = task().encode([Row({"prompt": "gout?", "completion": "a pain"}, "a")], processor)
    assert processor.decode(example.features["input_ids"]) == "<s>gout?\na pain</s>"
    assert taught(example, processor) == "a pain</s>"
    (example,) = task(format="text").encode([Row({"text": "a pain"}, "a")], processor)
    assert taught(example, processor) == "a pain</s>"
    (prompt,) = task().encode([Row({"text": "gout?"}, "a")], processor, labelled=False)
    assert processor.decode(prompt.features["input_ids"]) == "<s>gout?\n" and prompt.target is None


@pytest.mark.parametrize("turns", [("hi", "yes"), ("hi", "yes", "so", "no, never")])
def test_of_a_conversation_the_assistants_turns_are_learnt(turns: tuple[str, ...]) -> None:
    processor = tiny_lm.tokenizer(CHATML)
    (example,) = task(format="messages", max_length=128).encode([talk(*turns)], processor)
    whole = processor.apply_chat_template(talk(*turns).values["messages"], tokenize=False)
    assert processor.decode(example.features["input_ids"]) == whole
    assert taught(example, processor) == "".join(f"{turn}<|im_end|>\n" for turn in turns[1::2])
    asked = Row({"text": turns[0]}, "a")
    (prompt,) = task(format="messages", max_length=128).encode([asked], processor, labelled=False)
    before = processor.decode(prompt.features["input_ids"])
    assert before == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" and whole.startswith(before)


def test_a_template_that_marks_the_assistants_turns_is_taken_at_its_word() -> None:
    processor = tiny_lm.tokenizer(GENERATION)
    (example,) = task(format="messages").encode([talk("hi", "yes", "so", "no")], processor)
    assert processor.decode(example.features["input_ids"]) == "hi?yes!so?no!"
    assert taught(example, processor) == "yes!no!"


def test_conversations_that_a_template_cannot_write_are_refused() -> None:
    with refuses(ModelError, "turns-rewritten"):
        task(format="messages").encode([talk("a", "b", "c", "d")], tiny_lm.tokenizer(FORGETFUL))
    task(format="messages").encode([talk("a", "b")], tiny_lm.tokenizer(FORGETFUL))
    with refuses(DataError, "turns-refused", where="talks.jsonl:7") as refused:
        task(format="messages").encode([talk(SECRET, "b", "c", first="system")], tiny_lm.tokenizer(STRICT))
    assert "system, user, assistant" in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_tokenizer_without_a_template_is_refused_for_conversations(tmp_path: Path) -> None:
    tiny_lm.save(tmp_path, "llama")
    with refuses(ModelError, "no-chat-template"):
        load_base(lm_run(tmp_path, task={"format": "messages"}))
    assert load_base(lm_run(tmp_path)).processor.pad_token == "</s>", (
        "padding is masked, so any token will do"
    )
    with refuses(ModelError, "above-positions") as caught:
        load_base(lm_run(tmp_path, task={"max_length": 129}))
    assert "task.max_length 129 " in str(caught.value) and " 128 " in str(caught.value)
    with pytest.raises(ModelError) as caught:
        load_base(lm_run(tmp_path, model={"load_in_4bit": True}))
    assert str(caught.value).startswith("model.load_in_4bit ")


@given(st.integers(0, 60), st.integers(1, 60), st.integers(8, 40), st.booleans())
def test_cutting_leaves_context_and_something_to_learn(
    context: int, answer: int, longest: int, with_bos: bool
) -> None:
    bos = [0] * with_bos
    prompt, completion = list(range(1, context + 2)), list(range(100, 100 + answer))
    ids = bos + prompt + completion
    short, labels = cut(ids, [IGNORED] * len(bos + prompt) + completion, longest, 0)
    assert len(short) == len(labels) == min(len(ids), longest)
    learnt = [label for label in labels if label != IGNORED]
    assert learnt and completion[: len(learnt)] == learnt, "the answer's beginning stays"
    kept = short[: len(short) - len(learnt)]
    assert short[len(kept) :] == learnt and len(kept) >= 1
    assert kept[:1] == ids[:1] or not with_bos
    assert kept[len(bos) :] == (prompt[-(len(kept) - len(bos)) :] if len(kept) > len(bos) else [])
    if len(learnt) < answer:  # then the prompt had been cut as far as it may
        assert len(kept) <= max(1, longest // LEAST_CONTEXT)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_packing_puts_every_row_in_one_place_and_none_over_the_length(lengths: list[int]) -> None:
    rows = bins(lengths, 30)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert all(size <= 30 for size in sizes)
    assert sum(size * 2 <= 30 for size in sizes) <= 1, "two rows that are half empty would be one"


def test_rows_that_were_cut_or_packed_are_counted_and_weights_are_about_one() -> None:
    processor = tiny_lm.tokenizer()
    short = task(max_length=16, packing=True)
    rows = lm_rows(20, 0)
    examples = short.encode(rows, processor)
    packed = short.pack(examples)
    longer = sum(len(r.values["prompt"]) + len(r.values["completion"]) + 3 > 16 for r in rows)
    assert 0 < longer < 20
    assert short.notes(rows, packed) == (
        f"{longer} of 20 training rows were cut to 16 tokens",
        f"20 training rows were packed into {len(packed)} sequences",
    )
    assert task().notes(rows, task().encode(rows, processor)) == ()
    for weighting in ("tokens", "examples"):
        which = task(loss_weighting=weighting, packing=True)
        for each in (which.encode(rows, processor), which.pack(which.encode(rows, processor))):
            weights = [e.weight for e in which.weigh(each)]
            assert sum(weights) == pytest.approx(len(weights))
            assert which.num_rows(each) == 20
            assert which.num_tokens(each) == sum(len(r.values["completion"]) + 1 for r in rows)


def test_a_row_with_nothing_to_learn_is_named() -> None:
    for which, row in (
        (task(), Row({"prompt": SECRET, "completion": ""}, "rows.csv:3")),
        (task(format="messages"), Row({"messages": [{"role": "user", "content": SECRET}]}, "rows.csv:3")),
    ):
        with refuses(DataError, "nothing-to-learn", where="rows.csv:3") as refused:
            which.encode([row], tiny_lm.tokenizer(CHATML))
        assert SECRET not in str(refused.value)


def load(folder: Path, rows: list[dict[str, Any]] | str, **options: Any) -> list[dict[str, Any]]:
    file = folder / ("rows.csv" if isinstance(rows, str) else "rows.jsonl")
    file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(source=file.name, split={"validation": 0, "test": 0})
    return [dict(row.values) for row in load_splits(source, folder, task(**options).columns, ())["train"]]


def test_conversations_are_lists_or_json_in_a_cell(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert load(tmp_path, [{"messages": messages}], format="messages") == [{"messages": messages}]
    cell = json.dumps(messages).replace('"', '""')
    assert load(tmp_path, f'messages\n"{cell}"\n', format="messages") == [{"messages": messages}]


def turn(role: Any = "user", content: Any = SECRET, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "kind", "named"),
    [
        (f"{SECRET} [", "messages-not-json", ""),
        ({"role": "user"}, "no-messages", ""),
        ([], "no-messages", ""),
        ([SECRET], "not-a-message", ", message 1 "),
        ([turn(), {"role": "assistant"}], "not-a-message", ", message 2 "),
        ([turn("asistant")], "message-role", ", message 1: "),
        ([turn(), turn("assistant", 3)], "message-content", ", message 2: "),
        ([turn(), turn("assistant", " ")], "message-content", ", message 2: "),
        ([turn(tool_calls=[1])], "message-fields", "(tool_calls)"),
        ([turn()], "no-answer", ""),
        (None, "empty-cell", ""),
    ],
)
def test_broken_conversations_are_named_and_not_quoted(
    tmp_path: Path, messages: Any, kind: str, named: str
) -> None:
    good = [turn(), turn("assistant", tool_calls=None)]
    with refuses(DataError, kind, where=f"{tmp_path}/rows.jsonl:2") as refused:
        load(tmp_path, [{"messages": good}, {"messages": messages}], format="messages")
    assert ": column 'messages'" in str(refused.value) and named in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("row", "kind", "column"),
    [
        ({"prompt": "", "completion": SECRET}, "empty-cell", "prompt"),
        ({"completion": SECRET}, "cell-missing", "prompt"),
        ({"prompt": SECRET, "completion": 3}, "not-a-text", "completion"),
        ({"prompt": SECRET, "completion": " "}, "empty-cell", "completion"),
    ],
)
def test_broken_prompts_and_completions_are_named(
    tmp_path: Path, row: dict[str, Any], kind: str, column: str
) -> None:
    with refuses(DataError, kind, where=f"{tmp_path}/rows.jsonl:2") as refused:
        load(tmp_path, [{"prompt": "a", "completion": "b"}, row])
    assert f": column {column!r} " in str(refused.value) and SECRET not in str(refused.value)


def test_settings_that_cannot_work_are_refused() -> None:
    labels = {"name": "sequence_classification", "labels": ["a", "b"]}
    for sections, named in (
        ({"task": {"max_new_tokens": 48}}, "max_new_tokens 48 "),
        ({"model": {"load_in_4bit": True, "load_in_8bit": True}}, "load_in_4bit and load_in_8bit "),
        ({"model": {"load_in_8bit": True}, "aggregation": {"name": "fedex"}}, "aggregation fedex "),
        ({"evaluation": {"metric_for_best_model": "macro_f1"}}, "loss, perplexity, token_accuracy"),
    ):
        with pytest.raises(ValidationError) as caught:
            lm_run(Path("model"), **sections)  # type: ignore[arg-type]
        assert named in caught.value.errors()[0]["msg"]
    good = lm_run(Path("model"), aggregation={"name": "fedavg", "weighting": "tokens"})
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({**good.model_dump(), "task": labels})
    assert "aggregation.weighting tokens" in caught.value.errors()[0]["msg"]


def test_sites_are_weighed_by_tokens_only_if_they_count_them() -> None:
    rule = lm_run(Path("model"), aggregation={"name": "ffa", "weighting": "tokens"}).aggregation
    assert rule.weight(5, 700) == 700
    header = {"run_id": "r", "round": 1, "phase": "fit", "site": "a", "config_hash": "c", "input_hash": "i"}
    update = Update(UpdateHeader(**header, num_examples=5), Adapter({}))  # type: ignore[arg-type]
    check_trained(update, {}, Adapter({}), 5, None, FedAvg())
    with refuses(ProtocolError, "no-tokens"):
        check_trained(update, {}, Adapter({}), 5, None, rule)


def test_outcomes_are_right_or_wrong_tokens_without_intervals() -> None:
    good = Outcomes(values=((0,), (1,)), counts=(6, 2), loss_sum=16.0, num_rows=3)
    task().check_outcomes(good)
    assert task().metrics(good) == pytest.approx(
        {"loss": 2.0, "perplexity": 7.389056, "token_accuracy": 0.25}
    )
    for bad in (
        Outcomes(values=((2,),), counts=(6,)),
        Outcomes(values=((0, 1),), counts=(6,)),
        Outcomes(values=((0,),), counts=(2,), num_rows=3),
    ):
        with pytest.raises(ProtocolError):
            task().check_outcomes(bad)
    found = summarise(task(), "test", {"a": good}, intervals=True)
    assert found.rows == {"a": 3}
    assert found.intervals == {}, "tokens of a text hang together: resampling them says too little"
    assert task().sign("perplexity") == task().sign("loss") == -1 == -task().sign("token_accuracy")
