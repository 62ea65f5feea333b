# ruff: noqa: E501 - tables of messages, one a line
"""Bad input: each is one clear error that says what, where and what to do; an earlier run stays as it was.

Every case is a working run with one thing spoilt, or its output with one thing spoilt. The run is started over a
finished one with `--resume`, which is when there is most to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import (
    LISTED,
    ROWS,
    Spoil,
    arrays,
    assert_one_error,
    base,
    both,
    change,
    command,
    csv,
    cut,
    drop,
    files_of,
    line,
    put,
    setting,
    source,
)

ADAPTER = "adapter/adapter_model.safetensors"
Case = tuple[str, Spoil | None, str, str]
"""What is spoilt, how, arguments, and the words of the error, separated by ` | `, in their order."""

RUN_FILE: list[Case] = [
    ("misspelt field", change("tiny.yaml", "max_steps", "max_step"), "", "tiny.yaml:6: training.max_step: | no such field | did you mean training.max_steps?"),
    ("wrong type", change("tiny.yaml", "r: 4", "r: four"), "", "tiny.yaml:5: adapter.r: | must be a whole number | (value \"four\")"),
    ("YAML syntax", change("tiny.yaml", "{r: 4}", "{r: 4"), "", "tiny.yaml: line 6, column 9: | expected ',' or '}' | not valid YAML"),
    ("tab in YAML", change("tiny.yaml", "adapter: {r: 4}", "adapter:\n\tr: 4"), "", "tiny.yaml: line 6, column 1: | '\\t' | indent with spaces"),
    ("key given twice", change("tiny.yaml", "data: notes", "data: notes\ndata: other"), "", "tiny.yaml: line 4, column 1: | 'data' is given twice (first in line 3) | keep one"),
    ("empty run file", put("tiny.yaml", ""), "", "tiny.yaml: holds nothing | `field: value` lines"),
    ("run file is binary", put("tiny.yaml", b"\x89PNG\xff"), "", "tiny.yaml: byte 0 is not UTF-8 | save the file as UTF-8"),
    ("run file absent", drop("tiny.yaml"), "", "tiny.yaml: there is no such file | check the path"),
    ("negative learning rate", None, "training.learning_rate=-1", "training.learning_rate (set on the command line): must be a number above 0 | (value -1)"),
    ("learning rate out of all bounds", None, "training.learning_rate=1e38", "training.learning_rate | at most 1000000 | 1e+38"),
    ("negative seed", None, "seed=-1", "seed (set on the command line): | at least 0 | (value -1)"),
    ("one label alone", None, "task.labels=[cardiac]", "task.labels | at least 2 entries"),
    ("label listed twice", None, "task.labels=[cardiac,cardiac]", "task.labels | label 'cardiac' is listed twice"),
    ("unknown metric", None, "evaluation.metric_for_best_model=f1", "evaluation.metric_for_best_model 'f1' | choose one of accuracy, macro_f1"),
    ("unknown rule", None, "aggregation.name=fedexx", "aggregation.name | must be one of fedavg, ffa, fedex | did you mean fedex?"),
    ("fedex with DoRA", None, "aggregation.name=fedex adapter.use_dora=true", "aggregation fedex | DoRA | set adapter.use_dora: false or choose aggregation fedavg"),
    ("fewer sites asked than the quorum", None, "federation.sites_per_round=1", "federation.quorum 2 is above federation.sites_per_round 1 | lower the quorum or ask more sites"),
    ("quorum above the number of sites", None, "federation.quorum=3", "federation.quorum: 3 is above the number of sites (2: north, south) | lower it to at most 2"),
    ("override of an unknown field", None, "training.max_stps=3", "command line: training.max_stps: | did you mean training.max_steps?"),
    ("override without =", None, "training.max_steps", "command line: 'training.max_steps' is not an override | write key=value"),
    ("output folder is a file", put("taken", ""), "-o taken", "cannot write to taken: | choose another folder with -o"),
    ("output folder cannot be made", None, "-o /sys/quorate", "cannot write to /sys/quorate: | choose another folder with -o"),
]  # fmt: skip

DATA: list[Case] = [
    ("sites file absent", drop("tiny.sites.yaml"), "", "tiny.sites.yaml: there is no such file | --sites"),
    ("unknown alias", None, "data=nots", "tiny.sites.yaml: | no data 'nots'; it has notes | correct `data` in the run file"),
    ("two sites of one name", put("tiny.sites.yaml", LISTED.replace("south,", "north,")), "", "tiny.sites.yaml:1: data.notes: site name 'north' is given twice | a name of its own"),
    ("two sites of one name in a partition", change("tiny.sites.yaml", "south", "north"), "", "data.notes.partition.sites: site name 'north' is given twice"),
    ("name of a site", change("tiny.sites.yaml", "south", "'../south'"), "", "data.notes.partition.sites[1] | letters, digits | \"../south\""),
    ("more sites than rows", change("tiny.sites.yaml", "[north, south]", "900"), "", "has no training rows: 40 rows over 900 sites | use fewer sites or more rows"),
    ("Dirichlet that asks for too many rows", change("tiny.sites.yaml", "by: iid,", "by: dirichlet, alpha: 1, min_rows: 30,"), "", "40 training rows cannot give each of 2 sites min_rows 30 | lower min_rows or use fewer sites"),
    ("Dirichlet that cannot be met", change("tiny.sites.yaml", "by: iid, sites: [north, south]", "by: dirichlet, alpha: 0.0001, sites: 4, min_rows: 9"), "", "1000 draws with alpha 0.0001 gave no partition | raise alpha or lower min_rows"),
    ("partition by a column that is not there", change("tiny.sites.yaml", "by: iid, sites: [north, south]", "by: column, column: hospital"), "", "notes.csv:2: column 'hospital' names no site | correct partition.column"),
    ("variable that is not set", change("tiny.sites.yaml", "notes.csv", "'${QUORATE_NOSUCH}/n.csv'"), "", "data.notes: source: environment variable QUORATE_NOSUCH is not set | export QUORATE_NOSUCH"),
    ("source absent", drop("notes.csv"), "", "data.notes: source: notes.csv does not exist | correct the path"),
    ("template with an absent column", change("tiny.sites.yaml", "notes.csv,", "notes.csv, template: 'age {age}',"), "", "notes.csv:2: column 'age' is missing | the data have: text, label | correct the template"),
    ("template that is not closed", change("tiny.sites.yaml", "notes.csv,", "notes.csv, template: 'age {age',"), "", "tiny.sites.yaml:1: data.notes: template: expected '}' | write {column}"),
    ("label mapped to none of the run's", change("tiny.sites.yaml", "notes.csv,", "notes.csv, labels: {x: lungs},"), "", "labels: 'x' is mapped to 'lungs' | its labels are cardiac, hepatic, pulmonary | Correct the mapping"),
    ("label that the run does not list", put("notes.csv", csv([*ROWS, ("scan", "lungs")])), "", "tiny.sites.yaml: data.notes: notes.csv:62: column 'label': label 'lungs' | its labels are cardiac, hepatic, pulmonary | Map it with `labels`"),
    ("several labels in a run with one", line(text="scan", label=["cardiac"]), "", "notes.jsonl:61: label holds a list of labels | set task.problem_type: multi_label_classification"),
    ("no label", put("notes.csv", csv([*ROWS, ("scan", "")])), "", "notes.csv:62: column 'label' has no label | fill it in or remove the row"),
    ("text column absent", change("notes.csv", "text,label", "note,label"), "", "notes.csv:2: column 'text' is missing | the data have: note, label | Map it with `columns`"),
    ("row without the column", line(text="scan"), "", "notes.jsonl:61: column 'label' is missing; this row has: text | Fill it in or remove the row"),
    ("blank text", put("notes.csv", csv([*ROWS, ("  ", "cardiac")])), "", "notes.csv:62: column 'text' is empty | fill it in or remove the row"),
    ("text that is a number", line(text=5, label="cardiac"), "", "notes.jsonl:61: column 'text' holds a int, not a text | use `template`"),
    ("text with half a character", line(text="a\ud800", label="cardiac"), "", "notes.jsonl:61: column 'text' holds half of a character | mend it or remove the row"),
    ("empty file", put("notes.csv", ""), "", "notes.csv is empty | give it column names and rows"),
    ("header alone", put("notes.csv", "text,label\n"), "", "notes.csv is empty: it holds no row | give it rows"),
    ("ragged row", put("notes.csv", csv(ROWS) + "a,b,c\n"), "", "notes.csv:62: 3 cells under a header of 2 columns | double quotes"),
    ("quote that is not closed", put("notes.csv", csv(ROWS) + '"a,cardiac\n'), "", "notes.csv:62: not a row of a CSV file | must be closed"),
    ("not UTF-8", put("notes.csv", csv(ROWS).encode() + "körte,cardiac\n".encode("latin-1")), "", "notes.csv:62: byte 2 of the line is not UTF-8 | save the file as UTF-8"),
    ("JSON line cut off", source("notes.jsonl", '{"text": "a", "label": 0}\n{"text": "he'), "", "notes.jsonl:2: not one whole JSON object | the line may be cut off"),
    ("JSON line that is no object", source("notes.jsonl", '["a", "cardiac"]\n'), "", "notes.jsonl:1: a line must be a JSON object, this one is a list"),
    ("unknown ending", source("notes.xlsx", "PK"), "", "notes.xlsx: files ending in '.xlsx' cannot be read | use .jsonl"),
    ("folder without a train file", both(put("split/notes.csv", csv(ROWS)), change("tiny.sites.yaml", "notes.csv", "split")), "", "split has no training rows: there is no train file | only: notes.csv | Rename the file"),
    ("one row over two sites", put("notes.csv", csv(ROWS[:1])), "", "site south has no training rows: 1 rows over 2 sites | use fewer sites or more rows"),
    ("site without rows", both(put("tiny.sites.yaml", LISTED), put("north.csv", csv(ROWS)), put("south.csv", "text,label\n")), "", "data.notes, site south: south.csv is empty | give it rows"),
    ("site without a file", both(put("tiny.sites.yaml", LISTED), put("north.csv", csv(ROWS))), "", "data.notes, site south: source: south.csv does not exist | correct the path"),
]  # fmt: skip


def _nan(name: str, array: Any) -> tuple[str, Any]:
    return name, array * np.nan if name.endswith("word_embeddings.weight") else array


MODEL: list[Case] = [
    ("model absent", None, "model.model_name_or_path=./nosuch", "model.model_name_or_path: | nosuch does not exist | correct the path"),
    ("model that is a file", None, "model.model_name_or_path=./notes.csv", "notes.csv is a file | name the folder that holds config.json"),
    ("hub id that is not in the cache", None, "model.model_name_or_path=nosuch/model", "'nosuch/model' is no folder | HF_HUB_OFFLINE forbids fetching it | give a folder"),
    ("variable of the model that is not set", None, "model.model_name_or_path=${QUORATE_NOSUCH}/m", "model.model_name_or_path: environment variable QUORATE_NOSUCH is not set | export QUORATE_NOSUCH"),
    ("hash that is none", None, "model.sha256=abc", "model.sha256 | 64 hexadecimal digits | \"abc\""),
    ("hash of other weights", None, f"model.sha256={'0' * 64}", "weights have sha256 | the run file says 0000 | correct model.sha256"),
    ("weights that can run code alone", base(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")), "", "base holds no .safetensors weights | convert the model with save_pretrained"),
    ("weights cut off in the header", base(cut("model.safetensors", 20)), "", "base/model.safetensors is not a whole safetensors file | get it again"),
    ("weights cut off in the data", base(cut("model.safetensors", 5000)), "", "base/model.safetensors is not a whole safetensors file | get it again"),
    ("weights with NaN", base(arrays("model.safetensors", _nan)), "", "word_embeddings.weight hold NaN or infinity | get the model again"),
    ("weights of another model", base(arrays("model.safetensors", lambda name, array: (f"other.{name}", array))), "", "base holds no weights of bert.embeddings | and 18 more | take a base model that holds them"),
    ("configuration of another model", base(setting("config.json", hidden_size=64)), "", "base holds no weights of bert.embeddings | take a base model that holds them"),
    ("configuration that is no JSON", base(cut("config.json", 20)), "", "base/config.json' is not a valid JSON file | get the model's files again"),
    ("configuration absent", base(drop("config.json")), "", "base holds no config.json | made by save_pretrained"),
    ("configuration with a wrong type", base(setting("config.json", hidden_size="x")), "", "base cannot be loaded | 'hidden_size' | get the model's files again"),
    ("unknown architecture", base(setting("config.json", model_type="nosuch")), "", "base cannot be loaded as AutoModelForSequenceClassification | `nosuch` | name a model that has this head"),
    ("architecture without such a head", base(setting("config.json", model_type="vit")), "", "base cannot be loaded as AutoModelForSequenceClassification | name a model that has this head"),
    ("no tokenizer", base(drop("tokenizer.json"), drop("vocab.txt"), drop("tokenizer_config.json")), "", "base holds no vocabulary (tokenizer.json) | put the model's tokenizer there"),
    ("tokenizer cut off", base(cut("tokenizer.json", 100)), "", "base has no usable tokenizer | get the tokenizer's files again"),
    ("tokenizer of another model", base(change("tokenizer.json", '"scan": 10', '"scan": 500')), "", "base: the tokenizer gives a text token 500, the model has embeddings for 21 | get the model's tokenizer"),
    ("tokenizer without a pad token", base(setting("tokenizer_config.json", pad_token=None)), "", "base: the tokenizer has no pad token | set model.pad_token | [SEP]"),
    ("pad token that is not in the vocabulary", base(setting("tokenizer_config.json", pad_token=None)), "model.pad_token=nosuch", "model.pad_token 'nosuch' is not in the tokenizer's vocabulary | name one of | [SEP]"),
    ("max_length above the positions", None, "task.max_length=65", "task.max_length 65 is above the 64 positions | lower it"),
    ("target_modules that match nothing", None, "adapter.target_modules=[nosuch]", "adapter.target_modules: | no module 'nosuch' | key, query, value; name some"),
    ("target_modules that are an ending, not a list", None, "adapter.target_modules=query", "adapter.target_modules: the regular expression 'query' matches no module's whole name | [query, value]"),
    ("target_modules that are no regular expression", None, "adapter.target_modules=((", "adapter.target_modules | '((' is not a regular expression | mend it"),
    ("target_modules that name nothing", None, "adapter.target_modules=[]", "adapter.target_modules | names no module | leave the field out"),
    ("target_modules that are the head", None, "adapter.target_modules=[classifier]", "adapter.target_modules ('classifier',) | trained whole | name some of them"),
    ("target_modules that are no linear layers", None, "adapter.target_modules=[word_embeddings]", "word_embeddings | only linear layers and convolutions can be | narrow adapter.target_modules"),
]  # fmt: skip


def cases(*tables: list[Case]) -> pytest.MarkDecorator:
    """Parametrise with tables, named by what is spoilt."""
    listed = [case for table in tables for case in table]
    return pytest.mark.parametrize(
        ("spoil", "arguments", "words"), [case[1:] for case in listed], ids=[case[0] for case in listed]
    )


@cases(RUN_FILE, DATA, MODEL)
def test_bad_input_is_one_clear_error(folder: Path, spoil: Spoil | None, arguments: str, words: str) -> None:
    before = files_of(folder / "runs")
    if spoil:
        spoil(folder)
    said = command("simulate", "tiny.yaml", *arguments.split(), "--resume")
    assert said.code == 2, said
    assert_one_error(said.err, words)
    assert not said.out and files_of(folder / "runs") == before


LATER = ("sites file absent", "several labels in a run with one")
"""What `validate` may pass: it takes a run file alone, and what the task makes of a row shows in the run."""


@cases([case for case in DATA if case[0] not in LATER])
def test_validate_says_the_same_of_data(
    folder: Path, spoil: Spoil | None, arguments: str, words: str
) -> None:
    if spoil:
        spoil(folder)
    said = command("validate", "tiny.yaml", *arguments.split())
    assert said.code == 2
    assert_one_error(said.err, words)


def test_several_problems_are_a_line_each(folder: Path) -> None:
    change("tiny.yaml", "max_steps", "max_step")(folder)
    said = command("simulate", "tiny.yaml", "seed=-1", "adapter.r=0")
    assert said.code == 2
    starts = ["ConfigError: tiny.yaml: seed ", "tiny.yaml: adapter.r ", "tiny.yaml:6: training.max_step:"]
    assert all(line.startswith(start) for line, start in zip(said.err.splitlines(), starts, strict=True))


def test_the_run_that_is_spoilt_here_works(folder: Path) -> None:
    assert command("simulate", "tiny.yaml", "-o", "out").code == 0
    same = [
        (place / "adapter/adapter_model.safetensors").read_bytes()
        for place in (folder / "out", folder / "runs/tiny")
    ]
    assert same[0] == same[1]


RESUME = ["simulate", "tiny.yaml", "--resume"]
PREDICT = ["predict", "runs/tiny", "lung cough"]
AFTERWARDS: list[tuple[str, Spoil | None, Sequence[str], str]] = [
    ("no --resume", None, ["simulate", "tiny.yaml"], "runs/tiny already holds a run | --resume, or choose another folder (-o)"),
    ("other settings", None, [*RESUME, "training.learning_rate=0.5"], "runs/tiny holds a run with other settings (training) | with the same run file"),
    ("checkpoint cut off", cut("runs/tiny/checkpoint-2/state.safetensors", 99), RESUME, "checkpoint-2/state.safetensors is not what was written | delete checkpoint-2 to resume from checkpoint-1"),
    ("checkpoint edited", put("runs/tiny/checkpoint-2/progress.json", "{}"), RESUME, "checkpoint-2/progress.json is not what was written | delete checkpoint-2"),
    ("checkpoint without sums", drop("runs/tiny/checkpoint-2/SHA256SUMS"), RESUME, "checkpoint-2: a file is missing or unreadable | delete checkpoint-2"),
    ("record edited", put("runs/tiny/record.jsonl", "{}\n"), RESUME, "record.jsonl, line 1: not a RoundRecord | take the line out"),
    ("record that is a folder", both(drop("runs/tiny/record.jsonl"), put("runs/tiny/record.jsonl/x", "")), RESUME, "record.jsonl: cannot be read: Is a directory | mend that"),
    ("run.yaml edited", put("runs/tiny/run.yaml", "name: [\n"), RESUME, "runs/tiny/run.yaml: line 2, column 1: | not closed"),
    ("report of no run", None, ["report", "nosuch"], "nosuch: holds no run (no run.yaml) | name the output folder of a run"),
    ("report of a damaged summary", cut("runs/tiny/summary.json", 99), ["report", "runs/tiny"], "runs/tiny/summary.json: | edited or damaged | resume the run, which writes it again"),
    ("report of damaged metrics", put("runs/tiny/metrics.jsonl", b"\xff\n"), ["report", "runs/tiny"], "runs/tiny/metrics.jsonl: cannot be read | restore it, or resume the run"),
    ("adapter absent", None, ["predict", "nosuch", "lung"], "nosuch: holds no adapter (no adapter_config.json) | name the adapter folder of a run"),
    ("adapter without weights", drop(f"runs/tiny/{ADAPTER}"), PREDICT, "runs/tiny/adapter has no adapter_model.safetensors | of a finished run"),
    ("adapter cut off", cut(f"runs/tiny/{ADAPTER}", 99), PREDICT, "adapter_model.safetensors: | not a safetensors file | write it again: quorate simulate RUN --resume"),
    ("adapter with NaN", arrays(f"runs/tiny/{ADAPTER}", lambda name, array: (name, array * np.nan)), PREDICT, "adapter_model.safetensors: | holds NaN or infinity | restore the folder"),
    ("adapter of another shape", arrays(f"runs/tiny/{ADAPTER}", lambda name, array: (name, array[:2])), PREDICT, "runs/tiny/adapter: | do not make an adapter for this base | restore the folder"),
    ("adapter with other names", arrays(f"runs/tiny/{ADAPTER}", lambda name, array: (name.replace("layer.1", "layer.9"), array)), PREDICT, "adapter_model.safetensors: | layer. | restore the folder"),
    ("adapter configuration that is no JSON", put("runs/tiny/adapter/adapter_config.json", "{"), PREDICT, "runs/tiny/adapter: adapter_config.json | JSONDecodeError | restore the folder"),
    ("adapter of an unknown kind", put("runs/tiny/adapter/adapter_config.json", '{"peft_type": "X"}'), PREDICT, "runs/tiny/adapter: adapter_config.json | restore the folder"),
    ("empty file of texts", put("new.txt", "\n"), ["predict", "runs/tiny", "new.txt"], "new.txt: holds no text | give at least one"),
    ("file of texts absent", None, ["predict", "runs/tiny", "new.txt"], "new.txt: there is no such file | check the path"),
    ("texts that are not UTF-8", put("new.txt", b"\xff"), ["predict", "runs/tiny", "new.txt"], "new.txt: byte 0 is not UTF-8 | save the file as UTF-8"),
    ("texts that are no JSON", put("new.jsonl", "{\n"), ["predict", "runs/tiny", "new.jsonl"], "new.jsonl:1: is not JSON | give one object a line"),
    ("texts without the field", put("new.jsonl", '{"txt": "a"}\n'), ["predict", "runs/tiny", "new.jsonl"], "new.jsonl:1: has no field `text` | give it one"),
    ("text with half a character", put("new.jsonl", '{"text": "a\\ud800"}\n'), ["predict", "runs/tiny", "new.jsonl"], "new.jsonl:1: `text` holds half of a character | mend it"),
    ("argument that is not UTF-8", None, ["predict", "runs/tiny", "k\udcf6rte"], "TEXT: is not UTF-8 | in a UTF-8 file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"), [case[1:] for case in AFTERWARDS], ids=[case[0] for case in AFTERWARDS]
)
def test_a_finished_run_is_never_made_worse(
    folder: Path, spoil: Spoil | None, arguments: Sequence[str], words: str
) -> None:
    if spoil:
        spoil(folder)
    before = files_of(folder / "runs")
    said = command(*arguments)
    assert said.code == 2, said
    assert_one_error(said.err, words)
    assert not said.out and files_of(folder / "runs") == before
