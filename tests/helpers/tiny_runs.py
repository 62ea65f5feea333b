"""`quorate simulate` on a tiny BERT and three sites, and what of a run's end must not depend on chance."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from cli_forks import Ended, Forks

from quorate.server.tracking.events import EVENTS_FILE, EventsReader, Finished, RoundDone, Started

ROUNDS = 3
RUN = """
name: tiny
task: {name: sequence_classification, labels: [cardiac, hepatic, pulmonary], max_length: 24}
data: notes
model: {model_name_or_path: "${TINY_BERT}"}
adapter: {r: 4, lora_dropout: 0.1}
training: {max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1e-1, lr_scheduler_type: cosine}
federation: {rounds: 3, quorum: 2, grace_seconds: 0}
evaluation: {bootstrap_samples: 20}
save_total_limit: 1
"""
SITES = "data: {notes: {source: notes.csv, partition: {by: iid, sites: [east, north, south]}}}\n"
LABELS = {"cardiac": "heart blood rhythm", "hepatic": "liver dose drug", "pulmonary": "lung cough scan"}
CASES = {
    "fedavg": ("aggregation.name=fedavg",),
    "fedex": ("aggregation.name=fedex", "federation.sites_per_round=2"),
    "two checkpoints": ("save_total_limit=2",),
    "references": ("evaluation.references=[local_only,centralised]",),
}

TIMED = ("events.jsonl", "progress.json", "SHA256SUMS", "report.html")
"""What a run writes with the time in it: what these files say is not compared. `events.jsonl` also keeps the
beginning of a run that was killed, and tells its start again."""
PARTLY_TIMED = ("record.jsonl", "metrics.jsonl", "summary.json")
"""Those that are compared without what the clock decides."""

End = dict[str, Any]


class TinyRuns:
    """Runs of one run file under the overrides of a case, each into its own folder.

    Args:
        folder: the working directory; run file, sites file and data are written there.
        model: folder of the base model.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "TINY_BERT": str(model)}
        (folder / "tiny.yaml").write_text(RUN)
        (folder / "tiny.sites.yaml").write_text(SITES)
        draw, words = random.Random(5), " ".join(LABELS.values()).split()
        lines = [
            f"{' '.join(draw.sample(words, 4))} {draw.choice(own.split())},{label}"
            for _ in range(30)
            for label, own in LABELS.items()
        ]
        (folder / "notes.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
        self._forks = Forks(folder, self.env)
        self._whole: dict[str, End] = {}

    def simulate(self, case: str, out: str, *more: str, **stop: Any) -> Ended:
        """Run `quorate simulate`, to its end or to a stop (see Forks.run)."""
        return self._forks.run("simulate", "tiny.yaml", *CASES[case], "-o", out, *more, **stop)

    def whole(self, case: str) -> End:
        """The end of the case's run that was left alone."""
        if case not in self._whole:
            ended = self.simulate(case, f"whole-{case}")
            assert ended.code == 0, ended.err
            end = self._whole[case] = end_of(self.folder / f"whole-{case}")
            assert end["summary.json"]["best"]["round"] < ROUNDS, (
                "resuming must have to remember the best round"
            )
        return self._whole[case]

    def check_end(self, case: str, out: str) -> None:
        """Hold a run that was stopped and resumed against the one that was left alone."""
        end, whole = end_of(self.folder / out), self.whole(case)
        rounds = [[line["round"] for line in end[name]] for name in ("record.jsonl", "metrics.jsonl")]
        assert rounds == [list(range(1, ROUNDS + 1))] * 2
        assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= end.keys()
        assert end["files"] == whole["files"]
        assert [name for name in whole if end[name] != whole[name]] == []
        self.check_told(out)

    def check_told(self, out: str) -> None:
        """Read the events of a run that came to its end: whole lines, however often it was stopped."""
        events = EventsReader(self.folder / out / EVENTS_FILE).read()
        last = 0
        for each in events:
            if isinstance(each, Started):
                last = each.resumed_from
            elif isinstance(each, RoundDone):
                assert each.record.round == last + 1, "rounds follow on from their start"
                last += 1
        assert last == ROUNDS
        assert isinstance(events[-1], Finished)
        told, written = events[-1].summary, (self.folder / out / "summary.json").read_text()
        assert told.model_dump_json(indent=2) + "\n" == written

    def close(self) -> None:
        """End the forking process."""
        self._forks.close()


def end_of(out: Path) -> End:
    """All that a run leaves but run ids and what the clock decides (updates travel with their seconds).

    Every file but TIMED is compared, whole unless it is one of PARTLY_TIMED.
    """
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    end: End = {"files": list(map(str, files))}
    for path in files:
        if path.name not in (*TIMED, *PARTLY_TIMED):
            end[str(path)] = (out / path).read_bytes()
    for name in ("record.jsonl", "metrics.jsonl"):
        end[name] = [json.loads(line) for line in (out / name).read_text().splitlines()]
    for line in end["record.jsonl"]:
        del line["seconds"], line["bytes_up"]
    end["metrics.jsonl as written"] = (out / "metrics.jsonl").read_bytes()
    end["summary.json"] = summary = json.loads((out / "summary.json").read_text())
    del summary["run_id"], summary["seconds"], summary["bytes"]["up"], summary["bytes"]["total"]
    return end
