"""What many tests share: a small real BERT on disk, runs over it, and sites with rows."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before anything imports transformers or flwr: tests never ask the outside.
os.environ.update(HF_HUB_OFFLINE="1", FLWR_TELEMETRY_ENABLED="0", TOKENIZERS_PARALLELISM="false")
# A thread per core makes tiny models slow, and dozens of times slower where the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes says nothing on shared cores.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

# What imports make stays to the end, and no collection need look at it, nor run while it is made.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # what a test leaves in cycles is small
    gc.enable()


WORDS = tuple(
    [
        "fever",
        "cough",
        "pain",
        "rash",
        "dose",
        "scan",
        "blood",
        "heart",
        "liver",
        "lung",
        "bone",
        "nerve",
        "drug",
        "trial",
        "cell",
        "gene",
    ]
)
LABELS = ("cardiac", "hepatic", "pulmonary")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers with random weights and a word tokenizer, as `save_pretrained` writes it."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
    with torch.no_grad():  # BERT's init is so small that attention hardly matters; make errors visible
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def poolerless_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT as one that was trained on masked words alone: its files hold no pooler."""
    from transformers import AutoTokenizer, BertForMaskedLM

    folder = tmp_path_factory.mktemp("poolerless-bert")
    BertForMaskedLM.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


@pytest.fixture
def make_run(tiny_bert: Path) -> Callable[..., Any]:
    """Build a RunConfig over the tiny BERT; keyword arguments are merged into its sections."""
    from quorate.shared.config.run_config import RunConfig

    def make(**sections: Any) -> RunConfig:
        base: dict[str, Any] = {
            "name": "test",
            "seed": 3,
            "task": {"name": "sequence_classification", "labels": LABELS, "max_length": 24},
            "data": "notes",
            "model": {"model_name_or_path": str(tiny_bert)},
            "adapter": {"r": 4, "lora_alpha": 8},
            "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
            "federation": {"rounds": 2, "grace_seconds": 0, "reask_seconds": 0},
            "evaluation": {"bootstrap_samples": 20},
        }
        for name, section in sections.items():
            if isinstance(section, Mapping) and name in base:
                base[name] = {**base[name], **section}
            else:
                base[name] = section
        return RunConfig.model_validate(base)

    return make


def make_rows(count: int, seed: int, labels: tuple[int, ...] = (0, 1, 2)) -> list[Any]:
    """Texts of 2 to 16 words in which one word gives the label away."""
    from quorate.shared.tasks.task import Row

    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label = draw.choice(labels)
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 15))]
        words.insert(draw.randint(0, len(words)), ("heart", "liver", "lung")[label])
        rows.append(Row({"text": " ".join(words), "label": label}, f"rows-{seed}.jsonl:{index + 1}"))
    return rows


@pytest.fixture
def make_sites() -> Callable[..., dict[str, dict[str, list[Any]]]]:
    """Build sites with rows in every split: `make_sites(north=20, south=7)`."""

    def make(**sizes: int) -> dict[str, dict[str, list[Any]]]:
        return {
            name: {
                "train": make_rows(size, seed=10 * index + 1),
                "validation": make_rows(9, seed=10 * index + 2),
                "test": make_rows(11, seed=10 * index + 3),
            }
            for index, (name, size) in enumerate(sizes.items())
        }

    return make


@pytest.fixture
def plain_peft_loop() -> Callable[..., Any]:
    """The reference: PEFT's own model, with nothing of the trainer but the order of site `north`'s rows.

    Its optimiser is the trainer's, or what `optimizer` makes of the named trainable parameters, each group
    with its own peak learning rate.
    """
    import torch
    from loaded_models import load_model

    from quorate.client.trainer.optimizers import make_optimizer
    from quorate.client.trainer.schedule import BatchPlan, lr_factor
    from quorate.shared.model.lora_model import adapter_of

    def loop(run: Any, rows: list[Any], start: Any, round: int, optimizer: Any = None) -> Any:
        model = load_model(run)
        model.write_adapter(start)
        examples = run.task.weigh(run.task.encode(rows, model.processor))
        parameters = {name: p for name, p in model.peft.named_parameters() if p.requires_grad}
        make = optimizer or (lambda named: make_optimizer(run.training, named))
        optimizer = make(parameters)
        peaks = [group["lr"] for group in optimizer.param_groups]
        plan = BatchPlan(len(rows), run.training, run.seed, "north")
        total = run.federation.rounds * plan.steps_per_round
        for step, micro_batches in enumerate(plan.steps(round)):
            optimizer.zero_grad()
            count = sum(map(len, micro_batches))
            for micro in micro_batches:
                batch = run.task.collate([examples[row] for row in micro], model.processor)
                loss = run.task.loss(model.peft(**batch.inputs).logits, batch).sum() / count
                loss.backward()
            if run.training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters.values(), run.training.max_grad_norm)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                done = (round - 1) * plan.steps_per_round + step
                group["lr"] = peak * lr_factor(run.training, done, total)
            optimizer.step()
        return adapter_of(model.peft)

    return loop
