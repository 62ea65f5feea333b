"""Reading run and sites files: what is written is read back, and what is wrong is said in words."""
# ruff: noqa: E501 - tables of messages, one a line

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from refusals import refuses

from quorate.client.policy.site_config import ConnectionConfig, SiteConfig
from quorate.server.federation.folder import FederationConfig
from quorate.shared.config.config_model import ConfigModel
from quorate.shared.config.dialect import MAX_BYTES, MAX_VALUES, parse, read_mapping, write_mapping
from quorate.shared.config.fields import Node, root
from quorate.shared.config.load import load_run, load_sites_file, schema
from quorate.shared.config.read import dump_yaml, load_file
from quorate.shared.config.run_config import RunConfig
from quorate.shared.config.sites_config import SitesConfig
from quorate.shared.errors import ConfigError
from quorate.simulations.tuning.space import SpaceConfig

BASE: dict[str, Any] = {
    "name": "trial",
    "task": {"name": "sequence_classification", "labels": ["yes", "no"]},
    "data": "notes",
    "model": {"model_name_or_path": "some/model"},
    "federation": {"rounds": 3},
}
# Words of pydantic's own messages; a reader of ours must never see one.
FOREIGN = re.compile(r"Input should|Extra inputs|Field required|Value error|pydantic|type=|loc=|Traceback")

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def write(folder: Path, content: dict[str, Any] | str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    text = str(caught.value)
    assert not FOREIGN.search(text), text
    return [without_line(line.replace(str(path), "run.yaml")) for line in text.splitlines()]


def without_line(problem: str) -> str:
    """Leave out the number of the line, for tests of the words."""
    return re.sub(r"^run\.yaml:[0-9]+: ", "run.yaml: ", problem)


def places(model: type[ConfigModel], path: Path, *overrides: str) -> list[tuple[int | None, str]]:
    """Return line and field of each problem of a file."""
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides) if model is RunConfig else load_file(model, path)
    problems = [line.removeprefix(str(path)) for line in str(caught.value).splitlines()]
    found = [re.match(r"(?::([0-9]+))?: ([^ :]*)", problem) for problem in problems]
    return [(int(each[1]) if each[1] else None, each[2]) for each in found if each]


def keys(node: Node, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, child in node.fields.items():
        found += [(*path, name), *keys(child, (*path, name))]
    return found


# What is written is read back


@given(content=st.dictionaries(texts, values, max_size=4))
def test_yaml_reads_back_equal_in_both_versions(content: dict[str, Any]) -> None:
    text = write_mapping(content)
    assert parse(text, "x") == content
    assert yaml.safe_load(text) == content


@settings(max_examples=40)
@given(
    labels=st.lists(texts.map(str.strip).filter(bool), min_size=2, max_size=5, unique=True),
    rate=st.floats(1e-300, 1e6),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_resolved_run_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, labels: list[str], rate: float, seed: int
) -> None:
    task = {**BASE["task"], "labels": labels}
    run = RunConfig.model_validate({**BASE, "task": task, "seed": seed, "training": {"learning_rate": rate}})
    path = write(tmp_path_factory.mktemp("run"), dump_yaml(run))
    again = load_run(path)
    assert again == run
    assert again.content_hash == run.content_hash
    assert dump_yaml(again) == dump_yaml(run)


def test_sites_read_back_equal(tmp_path: Path) -> None:
    partition = {"by": "dirichlet", "sites": ["north", "no"], "alpha": 0.5}
    sites = SitesConfig.model_validate({"data": {"notes": {"source": "notes.csv", "partition": partition}}})
    assert load_sites_file(write(tmp_path, dump_yaml(sites), "run.sites.yaml")) == sites


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("yes", "no", "on", "off", "Y", "n")),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("3e-3", 0.003), ("1E5", 1e5), (".5", 0.5), ("-2.", -2.0), ("7", 7), ("-7", -7), ("0", 0),
        *((word, word) for word in ("010", "12:30", "2024-01-01", "1_000", "0x10", "=", "1.2.3")),
        ('"7"', "7"), ("[a, no]", ["a", "no"]),
    ],
)  # fmt: skip
def test_plain_values_mean_what_they_look_like(text: str, value: Any) -> None:
    found = parse(f"key: {text}", "x")["key"]
    assert found == value and type(found) is type(value)


def test_merge_keys_and_anchors_are_no_duplicates() -> None:
    text = "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, x: 3}"
    assert parse(text, "x")["c"] == {"x": 3, "y": 2}
    several = "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {z: 3, <<: [*a, *b]}\nd:\n- <<: *a\n  <<: *b"
    content = parse(several, "x")
    assert list(content["c"].items()) == [("x", 1), ("y", 2), ("z", 3)]
    assert content["d"] == [{"x": 2, "y": 2}]


# Files that are no configuration


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: caf\xe9", "byte 9 is not UTF-8"),
        (b"", "holds nothing"),
        (b"- a\n- b\n", "holds a list"),
        (b"just words", "holds a str"),
        (b"a: 1\nb: 2\na: 3\n", "line 3, column 1: key 'a' is given twice (first in line 1)"),
        (b"{a: 1, a: 1}", "key 'a' is given twice"),
        (
            b"a:\n  - x: 1\n    y: 2\n    'x': 3\n",
            "line 4, column 5: key 'x' is given twice (first in line 2)",
        ),
        (b"a: {1: x, 1.0: y}", "key 1.0 is given twice"),
        (b"a: [1, 2\n", "line 2, column 1"),
        (b"a: 1\n---\nb: 2\n", "another document"),
        (b"a: \x00", "special characters are not allowed"),
        (b"a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        (b"? [a]\n: 1", "unhashable key"),
        (b"a: " + b"[" * 1000, "recursion"),
        (b"a: " + b"9" * 5000, "4300 digits"),
        (b"#" * (MAX_BYTES + 1), "too large"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    (line,) = problems(path)
    assert line.startswith("run.yaml: ") and said in line


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(BASE).encode())
    assert load_run(path).name == "trial"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "run.yaml")[0]
    (tmp_path / "folder").mkdir()
    with refuses(ConfigError, "config-unreadable", where=str(tmp_path / "folder")):
        load_run(tmp_path / "folder")


@pytest.mark.parametrize("text", ["name: &x [*x]", "name: x\ntask: &y {name: *y}", "a: &a {<<: *a}"])
def test_an_anchor_within_itself(tmp_path: Path, text: str) -> None:
    (line,) = problems(write(tmp_path, text))
    assert "an anchor (&) contains itself" in line and f"line {text.count(chr(10)) + 1}, " in line


def test_anchors_are_counted_as_what_they_stand_for(tmp_path: Path) -> None:
    lists = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12)]
    (line,) = problems(write(tmp_path, "\n".join(["l0: &l0 [x]", *lists])))
    assert f"more than {MAX_VALUES} values" in line


@pytest.mark.parametrize("text", ["a: &x 1\nb: &x 2\nc: *x", "%YAML 1.1\n---\na: yes", "a: !!str 1"])
def test_what_is_odd_but_valid(text: str) -> None:
    assert parse(text, "x") in ({"a": 1, "b": 2, "c": 2}, {"a": "yes"}, {"a": "1"})


@pytest.mark.parametrize(
    "tag",
    [
        "!!binary eA==",
        "!!set {x}",
        "!!timestamp 2024-01-01",
        "!own x",
        "!!bool maybe",
        "!!map [x]",
        "!!seq {x: y}",
        "!!map x",
        "!!str [x]",
    ],
)
def test_a_tag_that_means_nothing_here(tmp_path: Path, tag: str) -> None:
    (line,) = problems(write(tmp_path, f"name: x\na: {tag}\n"))
    assert line.startswith("run.yaml: line 2, column 4: ")


# Fields that are wrong


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"trainig": {}}, "trainig: there is no such field; did you mean training?"),
        ({"training": {"learning_rte": 1}}, "training.learning_rte: there is no such field; did you mean training.learning_rate?"),
        ({"learning_rate": 1}, "learning_rate: there is no such field; did you mean training.learning_rate?"),
        ({"federation": {"rounds": 0}}, "federation.rounds: must be a whole number of at least 1 and at most 1000000 (value 0)."),
        ({"federation": {"rounds": "many"}}, 'federation.rounds: must be a whole number of at least 1 and at most 1000000 (value "many").'),
        ({"federation": {"rounds": 1.5}}, "federation.rounds: must be a whole number of at least 1 and at most 1000000 (value 1.5)."),
        ({"federation": {"rounds": None}}, "federation.rounds: must be a whole number of at least 1 and at most 1000000 (value null); write a value."),
        ({"training": {"learning_rate": 0}}, "training.learning_rate: must be a number above 0 and at most 1000000 (value 0)."),
        ({"training": {"adam_beta1": 1}}, "training.adam_beta1: must be a number of at least 0 and below 1 (value 1)."),
        ({"training": {"learning_rate": math.inf}}, "training.learning_rate: must be a number above 0 and at most 1000000 (value Infinity); infinity and NaN are not allowed."),
        ({"training": {"bf16": "perhaps"}}, 'training.bf16: must be true or false (value "perhaps").'),
        ({"training": {"optim": "adam"}}, 'training.optim: must be one of adamw_torch, adamw_bnb_8bit, adafactor, sgd (value "adam"); did you mean adamw_torch?'),
        ({"training": [1]}, "training: must be a section of `field: value` lines (value [1])."),
        ({"aggregation": {"name": "fedexx"}}, 'aggregation.name: must be one of fedavg, ffa, fedex, reptile (value "fedexx"); did you mean fedex?'),
        ({"aggregation": {"weighting": "uniform"}}, "aggregation.name: is missing; add it: one of fedavg, ffa, fedex, reptile."),
        ({"aggregation": {"name": "fedavg", "weighting": "unifrom"}}, 'aggregation.weighting: must be one of examples, tokens, uniform (value "unifrom"); did you mean uniform?'),
        ({"privacy": {"unit": "site", "delta": 0.1}}, 'privacy.unit: must be one of record, group, client (value "site").'),
        ({"privacy": {"unit": "clients", "delta": 0.1}}, 'privacy.unit: must be one of record, group, client (value "clients"); did you mean client?'),
        ({"privacy": {"delta": 0.1}}, "privacy.unit: is missing; add it: one of record, group, client."),
        ({"privacy": {"unit": "group", "delta": 2, "noise_multiplier": 1}}, "privacy.delta: must be a number of at least 1e-12 and below 1 (value 2)."),
        ({"privacy": {"unit": "client", "delta": 2, "noise_multiplier": 1}}, "privacy.delta: must be a number of at least 1e-12 and below 1 (value 2)."),
        ({"privacy": {"unit": "client", "delta": 0.1}}, "privacy: give either target_epsilon or noise_multiplier."),
        ({"name": "my run!"}, 'name: must be 1 to 64 letters, digits, `_`, `.` or `-`, with a letter or digit in front (value "my run!").'),
        ({"model": {"model_name_or_path": "m", "sha256": "AB"}}, 'model.sha256: must be 64 hexadecimal digits in lower case (value "AB").'),
        ({"report_to": "tensorboard"}, 'report_to: must be a list (value "tensorboard"); write report_to: [tensorboard].'),
        ({"adapter": {"target_modules": 3}}, "adapter.target_modules: must be a list or text (value 3)."),
        ({"data": 7}, 'data: must be text (value 7); put it in quotes: "7".'),
        ({"federation": {"rounds": 3, "quorum": 4, "sites_per_round": 2}}, "federation.quorum 4 is above federation.sites_per_round 2; lower the quorum or ask more sites."),
    ],
)  # fmt: skip
def test_one_wrong_field(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    assert problems(write(tmp_path, {**BASE, **change})) == [f"run.yaml: {line}"]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"labels": ["a", 3]}, 'task.labels[1]: must be text that is not empty, of at most 200 characters (value 3); put it in quotes: "3".'),
        ({"labels": ["a", True]}, 'put it in quotes: "true".'),
        ({"labels": ["a", None]}, 'put it in quotes: "null".'),
        ({"labels": ["a"]}, 'task.labels: must be a list of at least 2 entries (value ["a"]).'),
        ({"labels": "a, b"}, "write labels: [a, b]."),
        ({"labels": ["a", "a"]}, "task.labels: label 'a' is listed twice."),
        ({"class_weights": "balance"}, 'task.class_weights: must be one of none, balanced or a list (value "balance"); did you mean balanced?'),
        ({"class_weights": [1, -1]}, "task.class_weights[1]: must be a number of at least 0 (value -1)."),
        ({"class_weights": [1, 1, 1]}, "class_weights has 3 weights for 2 labels"),
        ({"name": "sequence_clasification"}, "did you mean sequence_classification?"),
    ],
)  # fmt: skip
def test_one_wrong_field_of_the_task(tmp_path: Path, task: dict[str, Any], said: str) -> None:
    (line,) = problems(write(tmp_path, {**BASE, "task": {**BASE["task"], **task}}))
    assert said in line


def test_a_section_written_as_its_name(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path, {**BASE, "aggregation": "fedex"}))
    assert "write aggregation.name: fedex, one of fedavg, ffa, fedex, reptile." in line


def test_every_problem_is_listed(tmp_path: Path) -> None:
    content = {**BASE, "trainig": {}, "seed": -1, "federation": {"quorum": 0}, 5: 6}
    lines = problems(write(tmp_path, content))
    fields = {line.split(": ")[1] for line in lines}
    assert {"trainig", "seed", "federation.quorum", "federation.rounds", "key 5 must be text"} == fields
    assert all(line.startswith("run.yaml: ") for line in lines)


def test_missing_fields_say_what_they_are_for(tmp_path: Path) -> None:
    lines = problems(write(tmp_path, {"name": "trial"}))
    assert [line.split(" ")[1] for line in lines] == ["task:", "data:", "model:", "federation:"]
    assert "add it: a section with rounds." in lines[-1]
    assert "(Alias of the data; every site says for itself what it stands for)" in lines[1]


def test_long_values_are_cut_short(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path, {**BASE, "seed": "x" * 1000}))
    assert len(line) < 200


def test_a_problem_is_one_line_whatever_a_key_holds(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path, {**BASE, "a\x85b": None}))
    assert "a\\x85b: there is no such field" in line


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_is_written_is_a_run_or_a_list_of_problems(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content: dict[str, Any] = json.loads(json.dumps(BASE))
    for path in data.draw(st.lists(st.sampled_from(keys(root(RunConfig))), min_size=1, max_size=3)):
        section: Any = content
        for part in path[:-1]:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            name = data.draw(st.sampled_from([path[-1], path[-1][:-1] + "x"]))
            section[name] = data.draw(values)
    file = tmp_path_factory.mktemp("run") / "run.yaml"
    file.write_text(write_mapping(content), encoding="utf-8")
    try:
        run = load_run(file)
    except ConfigError as error:
        assert not FOREIGN.search(str(error).replace(json.dumps(content), "")), str(error)
        assert all(re.match(rf"{re.escape(str(file))}(:[0-9]+)?: ", line) for line in str(error).splitlines())
    else:
        file.write_text(dump_yaml(run), encoding="utf-8")
        assert load_run(file) == run


# Lines


HEAD = """\
name: trial
data: notes
model: {model_name_or_path: some/model}
federation:
  rounds: 3
"""
TASK = "task: {name: sequence_classification, labels: [a, b]}\n"
NUMBERS = """\
task:
  name: sequence_classification
  labels:
    - a
    - 3
  class_weights:
    - 1
    - -1
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TASK + "training:\n  seed: 1\n  # why\n  learning_rate: 0\n", [(10, "training.learning_rate"), (8, "training.seed")]),
        (TASK + "seed: >\n  many\n", [(7, "seed")]),
        (TASK + "trainig:\n  max_steps: 3\n", [(7, "trainig")]),
        (NUMBERS, [(10, "task.labels[1]"), (13, "task.class_weights[1]")]),
        (TASK + "aggregation:\n  name: fedexx\n", [(8, "aggregation.name")]),
        (TASK + "aggregation:\n\n  weighting: uniform\n", [(7, "aggregation.name")]),
        (TASK + "aggregation:\n  name: fedex\n  weighting: unifrom\n  junk: 1\n", [(9, "aggregation.weighting"), (10, "aggregation.junk")]),
        (TASK + "privacy:\n  unit: group\n  delta: 2\n  noise_multiplier: 1\n", [(9, "privacy.delta")]),
        (TASK + "privacy:\n  unit: client\n  delta: 0.1\n", [(7, "privacy")]),
        (TASK + "adapter:\n  target_modules:\n  - query\n  - 4\n", [(10, "adapter.target_modules[1]")]),
        ("", [(None, "task")]),
        (TASK + "base: &b\n  max_steps: 0\ntraining:\n  <<: *b\n", [(8, "training.max_steps"), (7, "base")]),
    ],
)  # fmt: skip
def test_problems_name_the_line(tmp_path: Path, text: str, found: list[tuple[int, str]]) -> None:
    assert places(RunConfig, write(tmp_path, HEAD + text)) == found


def test_lines_of_other_files(tmp_path: Path) -> None:
    listed = "data:\n  notes:\n    sites:\n    - name: a\n      source: x\n    -\n      name: b c\n"
    path = write(tmp_path, listed, "run.sites.yaml")
    assert places(SitesConfig, path) == [(7, "data.notes.sites[1].source"), (7, "data.notes.sites[1].name")]
    one = "data:\n  notes:\n    source: x\n    partition:\n      by: iid\n      sites:\n      - a\n      - b c\n"
    assert places(SitesConfig, write(tmp_path, one)) == [(8, "data.notes.partition.sites[1]")]
    named = "data:\n  notes: {source: x, partition: {by: iid, sites: 3}}\n  my notes:\n    sites: [{name: a, source: x}]\n"
    assert places(SitesConfig, write(tmp_path, named)) == [(3, "data")]
    policy = "data: {notes: {source: x}}\npolicy:\n  privacy_budgets:\n  - data: notes\n    delta: 2\n"
    assert places(SiteConfig, write(tmp_path, policy)) == [
        (4, "policy.privacy_budgets[0].max_epsilon"),
        (5, "policy.privacy_budgets[0].delta"),
    ]


def test_what_the_command_line_set_stands_in_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + TASK + "training:\n  max_steps: 3\n  seed: 1\n")
    assert places(RunConfig, path, "training.max_steps=0", "adapter={\n\nr: 0}") == [
        (None, "adapter.r"),
        (None, "training.max_steps"),
        (9, "training.seed"),
    ]


def test_merged_values_stand_where_they_are_written(tmp_path: Path) -> None:
    _, lines = read_mapping(write(tmp_path, "a: &a\n  x: 1\nb:\n- <<: *a\n  y:\n    2\n- *a\n"))
    of_b = {place[1:]: line for place, line in lines.items() if place[:1] == ("b",)}
    assert of_b == {(): 3, (0,): 4, (0, "x"): 2, (0, "y"): 5, (1,): 1, (1, "x"): 2}


# Unions


FILES = [RunConfig, SitesConfig, FederationConfig, SiteConfig, ConnectionConfig, SpaceConfig]


@pytest.mark.parametrize("model", FILES)
def test_every_union_says_by_itself_which_alternative_is_meant(model: type[ConfigModel]) -> None:
    """So that an error names the field and no alternative: pydantic's untagged unions are `anyOf`."""

    def unions(schema: Any) -> list[Any]:
        inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
        own = [schema["anyOf"]] if isinstance(schema, dict) and isinstance(schema.get("anyOf"), list) else []
        return own + [union for each in inner for union in unions(each)]

    kinds = [
        [part for part in union if part != {"type": "null"}] for union in unions(model.model_json_schema())
    ]
    assert all(len(parts) == 1 for parts in kinds)


# Overrides


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("training.learning_rate=3e-3", ("training", "learning_rate"), 0.003),
        ("training.max_steps=8", ("training", "max_steps"), 8),
        ("task.labels=[on, off, no]", ("task", "labels"), ["on", "off", "no"]),
        ("model.revision=a=b", ("model", "revision"), "a=b"),
        ("model.revision=", ("model", "revision"), None),
        ("aggregation.weighting=uniform", ("aggregation", "weighting"), "uniform"),
        ("aggregation.name=fedex", ("aggregation", "name"), "fedex"),
        ("adapter={r: 4, lora_alpha: 4}", ("adapter", "r"), 4),
        ("evaluation.references=[local_only]", ("evaluation", "references"), ["local_only"]),
    ],
)
def test_an_override_sets_its_field_alone(
    tmp_path: Path, override: str, field: tuple[str, str], value: Any
) -> None:
    path = write(tmp_path, {**BASE, "model": {"model_name_or_path": "m", "revision": "main"}})
    before, after = (run.model_dump(mode="json") for run in (load_run(path), load_run(path, [override])))
    assert after[field[0]][field[1]] == value
    if "{" not in override:
        before[field[0]][field[1]] = value
        assert {key: part for key, part in after.items() if key != "aggregation"} == {
            key: part for key, part in before.items() if key != "aggregation"
        }


def test_later_overrides_win_and_shared_sections_stay_apart(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    assert load_run(path, ["seed=1", "seed=2"]).seed == 2
    shared = yaml.safe_dump(BASE) + "training: &t {}\nevaluation: *t\n"
    run = load_run(write(tmp_path, shared), ["evaluation.every=2"])
    assert run.evaluation.every == 2


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.learning_rte=1", "command line: training.learning_rte: there is no such field; did you mean training.learning_rate?"),
        ("rounds=3", "command line: rounds: there is no such field; did you mean federation.rounds?"),
        ("batch_size=3", "command line: batch_size: there is no such field; did you mean training.per_device_train_batch_size or training.per_device_eval_batch_size?"),
        ("training", "command line: 'training' is not an override; write key=value, for instance training.max_steps=8."),
        ("=3", "command line: '=3' is not an override; write key=value, for instance training.max_steps=8."),
        ("task.labels.0=x", "command line: task.labels.0: task.labels has no fields of its own; set it whole: task.labels=..."),
        ("task.labels=[a", "command line: task.labels: line 1, column 3: expected ',' or ']', but got '<stream end>'; this is not valid YAML: a bracket or quote is not closed."),
        ("training.max_steps=0", "run.yaml: training.max_steps (set on the command line): must be a whole number of at least 1 and at most 1000000000 (value 0)."),
    ],
)  # fmt: skip
def test_one_wrong_override(tmp_path: Path, override: str, line: str) -> None:
    assert problems(write(tmp_path, BASE), override) == [line]


def test_wrong_overrides_are_listed_together(tmp_path: Path) -> None:
    lines = problems(write(tmp_path, BASE), "rounds=3", "federation.rounds=2", "lerning_rate=3")
    assert [line.split(": ")[1] for line in lines] == ["rounds", "lerning_rate"]


# Sites files


@pytest.mark.parametrize(
    ("notes", "line"),
    [
        ({"source": "x", "partition": {"by": "idd", "sites": 3}}, 'data.notes.partition.by: must be one of iid, dirichlet, column, sizes (value "idd"); did you mean iid?'),
        ({"source": "x", "partition": {"by": "iid", "sites": 0}}, "data.notes.partition.sites: must be a whole number of at least 1 and at most 100000 or a list of at least 1 entry (value 0)."),
        ({"source": "x", "partition": {"by": "iid", "sites": ["a", "b c"]}}, 'data.notes.partition.sites[1]: must be 1 to 64 letters, digits, `_`, `.` or `-`, with a letter or digit in front (value "b c").'),
        ({"source": "x", "partition": {"by": "iid", "sites": ["a", "a"]}}, "data.notes.partition.sites: site name 'a' is given twice; every site needs a name of its own."),
        ({"sourc": "x", "partition": {"by": "iid", "sites": 3}}, "data.notes.sourc: there is no such field; did you mean data.notes.source?"),
        ({"sites": [{"name": "a", "source": "x"}, {"name": "a", "source": "y"}]}, "data.notes: site name 'a' is given twice; every site needs a name of its own."),
    ],
)  # fmt: skip
def test_one_wrong_field_of_a_sites_file(tmp_path: Path, notes: dict[str, Any], line: str) -> None:
    path = write(tmp_path, {"data": {"notes": notes}})
    with pytest.raises(ConfigError) as caught:
        load_sites_file(path)
    said = str(caught.value).replace(str(path), "run.yaml").splitlines()
    assert without_line(said[-1]) == f"run.yaml: {line}"


def test_a_wrong_alias_in_a_sites_file(tmp_path: Path) -> None:
    source = {"source": "x", "partition": {"by": "iid", "sites": 3}}
    path = write(tmp_path, {"data": {"my notes": source}})
    with pytest.raises(ConfigError) as caught:
        load_sites_file(path)
    assert ': data: key "my notes" ' in str(caught.value)


# The schema


@pytest.mark.parametrize("model", FILES)
def test_the_schema_describes_every_field(model: type[ConfigModel]) -> None:
    described = schema(model)
    json.dumps(described)
    for place in (described, *described.get("$defs", {}).values()):
        for name, field in place.get("properties", {}).items():
            target = described.get("$defs", {}).get(field.get("$ref", "").rpartition("/")[2], {})
            assert field.get("description") or target.get("description"), f"{place['title']}.{name}"
    assert set(described["properties"]) == set(model.model_fields)


def test_the_schema_names_every_rule() -> None:
    assert set(root(RunConfig).fields["aggregation"].kinds) >= {"fedavg", "ffa", "fedex"}


@pytest.mark.parametrize(
    ("section", "field", "most"),
    [
        ("federation", "rounds", 10**6),
        ("training", "max_steps", 10**9),
        ("training", "num_train_epochs", 10**9),
        ("training", "gradient_accumulation_steps", 2**16),
        ("training", "per_device_train_batch_size", 2**16),
        ("training", "per_device_eval_batch_size", 2**16),
    ],
)
def test_numbers_that_no_machine_gets_through_are_refused(
    make_run: Any, section: str, field: str, most: int
) -> None:
    make_run(**{section: {field: most}})
    for value in (most + 1, 2**70):
        with pytest.raises(ValidationError) as caught:
            make_run(**{section: {field: value}})
        assert [error["loc"] for error in caught.value.errors()] == [(section, field)]


@pytest.mark.parametrize("content", ["%YAML 1.3\n---\na: 1", 'a: "\\U00110000"', 'a: "\\UFFFFFFFF"'])
def test_what_the_parser_has_no_error_for(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with refuses(ConfigError, "not-yaml", where=str(tmp_path / "run.yaml")):
        load_run(tmp_path / "run.yaml")
