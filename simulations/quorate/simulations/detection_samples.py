"""Pictures for the report of a simulation: what the model finds in a few test images.

A simulation alone can have them: it holds every site's images. In production none ever leaves a site.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from quorate.client.models.predictions import predict
from quorate.client.site.data_source import SiteRows
from quorate.server.report import write_report
from quorate.server.report.run_files import SAMPLES_DIR, SAMPLES_FILE
from quorate.server.rounds.run import ADAPTER_DIR
from quorate.server.tracking.records import Sample, SampleObject
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError
from quorate.shared.tasks import ObjectDetection
from quorate.shared.tasks.task import Row
from quorate.shared.tasks.vision.image_task import decode


def check_samples(config: RunConfig, samples: int) -> None:
    """Raise ConfigError where pictures are asked for of a task that has none."""
    if samples and not isinstance(config.task, ObjectDetection):
        raise ConfigError(f"samples: {config.task.name} has no pictures to show; leave it out.")


def write_samples(config: RunConfig, rows: Mapping[str, SiteRows], output_dir: Path, count: int) -> None:
    """Show what the exported adapter finds in the first test images of the first site, and renew the report.

    Args:
        config: a run of object detection.
        rows: site name -> split -> rows.
        output_dir: of a run that has its adapter; gets a folder `samples`.
        count: how many images at most.
    """
    assert isinstance(config.task, ObjectDetection)  # see check_samples
    site = min(rows)
    chosen: Sequence[Row] = rows[site].get("test", ())[:count]
    if not chosen:
        return
    folder = output_dir / SAMPLES_DIR
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    said = predict(output_dir / ADAPTER_DIR, [row.values["image"] for row in chosen], images=True)
    lines = []
    for number, (row, found) in enumerate(zip(chosen, said, strict=True), start=1):
        image = decode(row.values["image"], row.source)
        image.save(folder / f"{number}.png")
        sample = Sample(
            file=f"{number}.png",
            site=site,
            width=image.width,
            height=image.height,
            true=tuple(
                SampleObject(label=config.task.labels[label], box=tuple(box))
                for label, *box in row.values["objects"]
            ),
            found=tuple(SampleObject.model_validate(each) for each in found["objects"]),
            threshold=config.task.shown_threshold,
        )
        lines.append(sample.model_dump_json() + "\n")
    (folder / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")
    write_report(output_dir)
