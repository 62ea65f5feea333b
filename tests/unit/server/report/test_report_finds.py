"""The report's pictures: only where a simulation wrote some, whole in the page, escaped."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image
from refusals import refuses
from report_data import Shape, write_run

from quorate.server.report import write_report
from quorate.server.tracking.records import Sample, SampleObject
from quorate.shared.errors import OutputError

SHAPE = Shape(rounds=2, planned=2, intervals=False, references=())


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 30, 30)).save(stream, "PNG")
    return stream.getvalue()


def with_samples(folder: Path, label: str = "cell") -> Path:
    write_run(folder, SHAPE)
    (folder / "samples").mkdir()
    (folder / "samples" / "1.png").write_bytes(picture())
    sample = Sample(
        file="1.png",
        site="heart",
        width=20,
        height=10,
        true=(SampleObject(label=label, box=(1, 2, 3, 4)),),
        found=(SampleObject(label=label, box=(1.5, 2, 3, 4), score=0.875),),
        threshold=0.5,
    )
    (folder / "samples" / "samples.jsonl").write_text(sample.model_dump_json() + "\n")
    return folder


def test_without_samples_there_is_no_section(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", SHAPE)).read_text(encoding="utf-8")
    assert "What it finds" not in text and "<image" not in text


def test_the_image_and_its_boxes_are_in_the_page(tmp_path: Path) -> None:
    text = write_report(with_samples(tmp_path / "run")).read_text(encoding="utf-8")
    assert base64.b64encode(picture()).decode() in text
    assert 'id="finds"' in text and "1\N{NO-BREAK SPACE}true box, 1 found" in text
    assert '<rect x="1.5" y="2.0" width="3.0" height="4.0"' in text
    assert "found: cell, score 0.88" in text and "true: cell" in text
    assert "In production no image leaves its site" in text
    assert "img-src data:" in text and "http" not in text.split("</style>")[1]


def test_labels_are_shown_not_run(tmp_path: Path) -> None:
    text = write_report(with_samples(tmp_path / "run", "<script>x</script>")).read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_a_sample_without_its_image_is_named(tmp_path: Path) -> None:
    folder = with_samples(tmp_path / "run")
    (folder / "samples" / "1.png").unlink()
    with refuses(OutputError, where=str(folder / "samples" / "1.png")):
        write_report(folder)
    lines = folder / "samples" / "samples.jsonl"
    lines.write_text(lines.read_text().replace("1.png", "../1.png"))
    with refuses(OutputError, "not-as-written", where=str(lines)) as caught:
        write_report(folder)
    assert "line 1: file" in str(caught.value)
