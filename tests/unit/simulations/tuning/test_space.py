"""Space files of `quorate tune`: what is refused before the first trial, and what a grid holds."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from quorate.shared.config.load import load_run
from quorate.shared.errors import ConfigError
from quorate.simulations.tuning.space import SpaceConfig, as_overrides, load_space

RUN = """
name: trial
task: {name: sequence_classification, labels: [yes, no]}
data: notes
model: {model_name_or_path: base}
federation: {rounds: 3, quorum: 2}
"""


def load(folder: Path, space: str) -> SpaceConfig:
    (folder / "run.yaml").write_text(RUN)
    (folder / "space.yaml").write_text(space)
    return load_space(folder / "space.yaml", folder / "run.yaml")


def test_a_space(tmp_path: Path) -> None:
    space = load(
        tmp_path,
        """
space:
  training.learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
  adapter.r: {type: int, low: 2, high: 16}
  aggregation.name: {type: categorical, choices: [fedavg, ffa]}
""",
    )
    assert (space.sampler, space.pruner, space.trials) == ("tpe", "median", 20)
    values = {"training.learning_rate": 1.2345e-05, "adapter.r": 3, "aggregation.name": "ffa"}
    run = load_run(tmp_path / "run.yaml", as_overrides(values))
    assert (run.training.learning_rate, run.adapter.r, run.aggregation.name) == (1.2345e-05, 3, "ffa")


@pytest.mark.parametrize("value", [None, True, "no", "007", "1e3", 'a "b" c', 0.1 + 0.2, 5])
def test_values_reach_the_run_file_as_they_are(tmp_path: Path, value: object) -> None:
    from quorate.shared.config.dialect import parse

    (override,) = as_overrides({"key": value})
    assert parse(override.removeprefix("key="), "test") == value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("training.learning_rte: {type: float, low: 1, high: 2}", "did you mean training.learning_rate?"),
        ("learning_rate: {type: float, low: 1, high: 2}", "did you mean training.learning_rate?"),
        ("seed: {type: int, low: 1, high: 2}", "seed: cannot be searched: a seed is chance"),
        ("evaluation.every: {type: int, low: 1, high: 2}", "evaluation.every: cannot be searched: tri"),
        ("adapter.r: {type: int, low: 0, high: 2}", "adapter.r: 0 cannot stand there: "),
        ("adapter.r: {type: float, low: 1.5, high: 2}", "adapter.r: 1.5 cannot stand there: "),
        ("aggregation.name: {type: categorical, choices: [fedavg, fedexx]}", "'fedexx' cannot stand there: "),
        ("adapter.r: {type: int, low: 4, high: 2}", "low 4 is not below high 2"),
        ("adapter.r: {type: int, low: 0, high: 2, log: true}", "log needs low above 0"),
        ("adapter.r: {type: int, low: 1, high: 9, log: true, step: 2}", "log and step do not go together"),
        ("adapter.r: {type: categorical, choices: [1, 1]}", "choice 1 is listed twice"),
        ("adapter.r: {type: integer, low: 1, high: 2}", "space.yaml:2: space.adapter.r.type: "),
        ("adapter.r: {type: int, low: 1, hight: 2}", "hight"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"space:\n  {line}\n")
    assert said in str(caught.value) and "space.yaml" in str(caught.value)


def test_the_documented_space_is_one_for_its_recipe(tmp_path: Path) -> None:
    root = Path(__file__).parents[4]
    block = (root / "docs" / "tuning.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "space.yaml").write_text(block)
    space = load_space(tmp_path / "space.yaml", root / "simulations" / "recipes" / "sentiment.yaml")
    assert len(space.space) == 4


def test_every_problem_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "space:\n  seed: {type: int, low: 1, high: 2}\n  x: {type: int, low: 1, high: 2}\n")
    assert str(caught.value).count("\n") == 1


def test_a_grid_is_every_combination_in_an_order_of_its_seed() -> None:
    fields = {
        "adapter.r": {"type": "int", "low": 2, "high": 8, "step": 3},
        "training.weight_decay": {"type": "float", "low": 0, "high": 0.3, "step": 0.1},
        "training.optim": {"type": "categorical", "choices": ["sgd", "adamw_torch"]},
    }
    space = SpaceConfig.model_validate({"sampler": "grid", "space": fields})
    points = [tuple(point.values()) for point in space.grid()]
    assert len(set(points)) == len(points) == 3 * 4 * 2
    assert {point[0] for point in points} == {2, 5, 8} and {point[1] for point in points} == {
        0,
        0.1,
        0.2,
        0.3,
    }
    assert points == [tuple(point.values()) for point in space.grid()]
    assert points != [tuple(point.values()) for point in space.model_copy(update={"seed": 1}).grid()]
    with pytest.raises(ValidationError) as caught:
        SpaceConfig.model_validate(
            {
                "sampler": "grid",
                "space": {**fields, "training.weight_decay": {"type": "float", "low": 0, "high": 1}},
            }
        )
    assert "training.weight_decay" in caught.value.errors()[0]["msg"]
