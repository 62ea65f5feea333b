"""What a stranger with PEFT gets from exported adapters: a script that knows transformers and peft alone.

    python peft_logits.py JOBS.json

JOBS.json is a list of {adapter: folder, texts: JSON file, labels: count, max_length: tokens, out: .npz file}.
Written to `out`: `logits`, and `merged`, the logits after `merge_and_unload`; [texts, labels], float32.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def answer(adapter: Path, texts: list[str], labels: int, max_length: int) -> dict[str, np.ndarray]:
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    folder = base_folder(named)
    torch.manual_seed(20_26)  # whatever the files leave open is drawn here, and not as the run drew it
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    model = PeftModel.from_pretrained(base, adapter).eval()
    return {"logits": forward(model, tokens), "merged": forward(model.merge_and_unload(), tokens)}


def base_folder(named: str) -> str:
    """`package:NAME/PATH` is Quorate's; everything else is what `from_pretrained` takes."""
    if not named.startswith("package:"):
        return named
    package, _, path = named.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0]) / path)


def forward(model: Any, tokens: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(**tokens).logits.numpy()


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        texts = json.loads(Path(job["texts"]).read_text())
        np.savez(job["out"], **answer(Path(job["adapter"]), texts, job["labels"], job["max_length"]))
    ours = [name for name in sys.modules if name.split(".")[0] in ("quorate", "flwr")]
    assert not ours, f"this process was to know PEFT alone, and has {ours}"


if __name__ == "__main__":
    main()
