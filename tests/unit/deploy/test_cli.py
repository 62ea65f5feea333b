"""The command line: its flags, its help, its exit codes, and what it prints where."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from refusals import refuses

from quorate.deploy.cli import app, run
from quorate.deploy.commands.both.predict import read_texts
from quorate.deploy.environment import prepare_environment
from quorate.deploy.failures import report_failure
from quorate.shared.config.load import load_run
from quorate.shared.errors import CheckpointError, DataError, QuorateError, QuorumNotMet, RequestRefused

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "cli_flags.txt"
ROWS = [(f"text {number} {label}", label) for number in range(30) for label in ("yes", "no")]
RUN = """
name: trial
task: {name: sequence_classification, labels: [yes, no]}
data: notes
model: {model_name_or_path: base}
federation: {rounds: 3, quorum: 2}
"""
SITES = """
data:
  notes: {source: notes.csv, partition: {by: iid, sites: [north, south]}}
"""


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """The command line sets up its process; give the tests' own back."""
    root, ours = logging.getLogger(), logging.getLogger("quorate")
    kept, levels = dict(os.environ), (root.level, ours.level)
    yield
    logging.captureWarnings(False)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run file, its sites file, its data and a folder that looks like a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.yaml").write_text(RUN)
    (tmp_path / "trial.sites.yaml").write_text(SITES)
    (tmp_path / "notes.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS))
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base" / name).touch()
    return tmp_path


def commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {"": typer.main.get_command(app)}
    groups = [""]
    while groups:  # `data inspect` is a command in a group in the program
        name = groups.pop()
        group = found[name]
        assert isinstance(group, click.Group)
        inside = {f"{name} {each}".strip(): command for each, command in group.commands.items()}
        groups += [each for each, command in inside.items() if isinstance(command, click.Group)]
        found |= inside
    return found


def flags() -> str:
    lines = []
    for name, command in commands().items():
        for parameter in command.params:
            option = isinstance(parameter, click.Option)
            names = "/".join(parameter.opts) if option else parameter.metavar or parameter.name
            kind = "flag" if getattr(parameter, "is_flag", False) else parameter.type.name
            if isinstance(parameter.type, click.Choice):
                kind = "|".join(str(getattr(each, "value", each)) for each in parameter.type.choices)
            needed = " required" if parameter.required else ""
            lines.append(f"{f'quorate {name}'.strip()} {names} {kind}{needed}")
    return "\n".join(lines) + "\n"


# Help and flags


def test_the_flags_are_those_people_have_in_their_scripts() -> None:
    # After a change that is meant, write flags() to the golden file, and tell in CHANGELOG.md.
    assert flags() == GOLDEN.read_text()


@pytest.mark.parametrize("name", commands())
def test_every_command_and_option_has_help_and_is_documented(name: str) -> None:
    command, page = commands()[name], (ROOT / "docs" / "cli.md").read_text()
    assert command.help and f"Example: quorate {name}".strip() in command.help
    section = page if not name else page.split(f"\n## quorate {name}\n")[1].split("\n## ")[0]
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert f"`{option}" in section or f"quorate {option}" in section, f"{name} {option}"


@pytest.mark.parametrize("name", commands())
def test_help_shows_every_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*name.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for parameter in commands()[name].params:
        assert str(getattr(parameter, "help", "")).split(".")[0] in shown


def test_the_documented_exit_codes_are_those_of_the_errors() -> None:
    page = (ROOT / "docs" / "cli.md").read_text().split("## Exit codes")[1]
    documented = [
        int(line.split("|")[1]) for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()
    ]
    kinds = [QuorateError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert documented == sorted({0, 130, *(kind.exit_code for kind in kinds)}) == [0, 1, 2, 3, 4, 130]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("quorate ")


@pytest.mark.parametrize(
    "arguments", [["simulate"], ["nosuch"], ["schema", "runs"], ["report", "x", "--nosuch"], []]
)
def test_wrong_usage_is_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


# Errors and exit codes


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("notes.csv:3: no label."), 2, "DataError: notes.csv:3: no label."),
        (CheckpointError("damaged."), 2, "CheckpointError: damaged."),
        (QuorumNotMet("round 7 needs 3 sites."), 3, "QuorumNotMet: round 7 needs 3 sites."),
        (RequestRefused("rank 64 is above 16."), 1, "RequestRefused: rank 64 is above 16."),
        (OSError(errno.ENOSPC, "No space left", "runs/x"), 2, "runs/x: No space left; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "runs/x: Permission denied; get"),
    ],
)
def test_an_error_is_one_message_and_a_code(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_failure(error, show_traceback=False) == code
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_an_internal_error_keeps_its_words_in_a_private_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyError) as caught:
        {}["text of a patient"]
    assert report_failure(caught.value, show_traceback=False) == 1
    err = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert err.count("\n") == 1 and "KeyError in " in err and str(log) in err
    assert "patient" not in err and "text of a patient" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0
    assert report_failure(caught.value, show_traceback=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_exhausted_gpu_says_what_to_lower(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert report_failure(caught.value, show_traceback=False) == 1
    assert "lower training.per_device_train_batch_size or training.max_stack" in capsys.readouterr().err


def test_telemetry_is_off_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    prepare_environment()
    off = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED")
    on = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "FLWR_DISABLE_UPDATE_CHECK")
    assert {os.environ[name] for name in off} == {"0"} and {os.environ[name] for name in on} == {"1"}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


# validate, schema, report


def test_validate_says_what_will_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "trial.yaml", "training.max_steps=4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("OK trial.yaml with trial.sites.yaml\n") and err == ""
    assert "4 steps a round" in out and "north " in out and "south " in out


def test_validate_json_is_one_object_that_is_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "trial.yaml", "seed=5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert sum(sum(splits.values()) for splits in found["sites"].values()) == len(ROWS)
    (folder / "again.yaml").write_text(json.dumps(found["run"]))
    assert load_run(folder / "again.yaml").content_hash == found["config_hash"]
    assert load_run(folder / "again.yaml").seed == 5


def test_validate_without_a_sites_file_says_what_it_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "trial.sites.yaml").unlink()
    assert run(["validate", "trial.yaml"]) == 0
    assert "neither data nor model were looked for" in capsys.readouterr().out


def test_validate_looks_up_no_hub_id(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "trial.sites.yaml").write_text(SITES.replace("notes.csv", "hub:some/data"))
    assert run(["validate", "trial.yaml", "model.model_name_or_path=some/model"]) == 0
    out = capsys.readouterr().out
    assert "some/model is a hub id" in out and "were not fetched" in out


def test_validate_lists_every_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "base" / "model.safetensors").unlink()
    (folder / "notes.csv").unlink()
    assert run(["validate", "trial.yaml", "--json"]) == 2
    out, err = capsys.readouterr()
    model, data = json.loads(out)["problems"]
    assert model.startswith("trial.yaml: model.model_name_or_path: ") and "*.safetensors" in model
    assert data.startswith("trial.sites.yaml: data.notes: ") and "notes.csv" in data
    assert model in err and data in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["validate", "trial.yaml", "federation.quorum=3"], "3 is above the number of sites (2: north"),
        (["validate", "trial.yaml", "data=letters"], "has no data 'letters'; it has notes"),
        (["validate", "trial.yaml", "task.labels=[yes, maybe]"], "notes.csv:"),
        (["validate", "nosuch.yaml"], "nosuch.yaml: there is no such file"),
        (["validate", "nosuch"], "there is no recipe 'nosuch'; there are banking77, "),
        (["validate", "trial.yaml", "--sites", "mine.yaml"], "mine.yaml: there is no such file"),
        (["simulate", "trial.yaml", "rounds=3"], "did you mean federation.rounds?"),
        (["report", "."], ".: holds no run (no run.yaml)"),
        (["predict", ".", "a text"], ".: holds no adapter (no adapter_config.json)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert "Traceback" not in err


def test_inspect_reports_and_judges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "inspect", "trial.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True and [each["name"] for each in found["sites"]] == ["north", "south"]
    assert found["sources"][0]["rows"] == {"train": len(ROWS)}
    assert "lengths in tokens were not measured" in found["notes"][0]  # the model's files are empty
    assert run(["data", "inspect", "trial.yaml", "--site", "south", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"] == found["sites"][1:]

    with (folder / "notes.csv").open("a") as stream:
        stream.write("text of a patient,maybe\n")
    assert run(["data", "inspect", "trial.yaml"]) == 2
    out, err = capsys.readouterr()
    assert f"notes.csv:{len(ROWS) + 2}: column 'label': label 'maybe' is not among" in out
    assert "north" in out and "south" in out and "patient" not in out + err
    assert err == "DataError: a run would refuse these data: notes: 1 rows cannot be used\n"
    assert run(["data", "inspect", "trial.yaml", "--site", "west"]) == 2
    assert "there is no site 'west'; there are north, south" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "sites"])
def test_schema_is_one_json_object(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", kind]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == f"Quorate {kind} file"


# predict's texts


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\n\n two \nthree", ["one", "two", "three"]),
        ("a.txt", "\ufeffone\r\ntwo\u2028still two\n", ["one", "two\u2028still two"]),
        ("a.jsonl", '{"text": "one\\nline", "label": 1}\n{"text": "two"}\n', ["one\nline", "two"]),
    ],
)
def test_texts_of_a_file(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_texts(str(tmp_path / name)) == texts


@pytest.mark.parametrize("text", ["a short text", "v" * 5000, "see notes.txt", "a/b", "two\nlines"])
def test_a_text_is_a_text(text: str) -> None:
    assert read_texts(text) == [text.replace("\n", " ")]


@pytest.mark.parametrize(
    ("where", "content", "kind", "named"),
    [
        ("a.jsonl:2", b'{"text": "secret"}\n{"text": secret}', "text-not-json", ""),
        ("a.jsonl:1", b'{"txt": "secret"}', "no-text-field", "`text`"),
        ("a.jsonl:1", b'["secret"]', "no-text-field", "`text`"),
        ("a.txt", b"secret \xff", "not-utf-8", "byte 7"),
        ("a.txt", b"\n \n", "no-text", ""),
        ("a.pdf", b"secret", "wrong-ending", ".jsonl"),
    ],
)
def test_files_without_texts(tmp_path: Path, where: str, content: bytes, kind: str, named: str) -> None:
    path = tmp_path / where.partition(":")[0]
    path.write_bytes(content)
    with refuses(DataError, kind, where=str(tmp_path / where)) as caught:
        read_texts(str(path))
    assert named in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["nosuch.txt", "folder/nosuch.jsonl"])
def test_a_missing_file_is_not_taken_for_a_text(name: str) -> None:
    with refuses(DataError, "no-such-file", where=name):
        read_texts(name)


# The process as a whole


def quorate(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from quorate.deploy.cli import main; main()", *arguments]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options)


def test_help_of_no_command_loads_a_heavy_library() -> None:
    program = """
import sys
from quorate.deploy.cli import run
for name in sys.argv[1:]:
    assert run([*name.split(), "--help"]) == 0
assert not {"torch", "transformers", "flwr", "numpy", "pydantic"} & sys.modules.keys(), sys.modules.keys()
"""
    names = [name for name in commands() if name]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_full_disk_is_bad_input(buffering: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        process = quorate("--version", stdout=full, env=environment | buffering)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("OutputError: ") and "free some space" in err and "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_exits_130_without_a_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    process = quorate("validate", str(pipe), stdout=subprocess.DEVNULL)
    with pipe.open("w"):  # returns once the command reads, and keeps it waiting
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted\n"
