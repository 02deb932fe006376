"""Two runs whose category names want to break out of the page, for the tests of report and comparison."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from configs.schema import Settings
from evaluate.report.write import write_report
from evaluate.stage import evaluate
from tests.conftest import tiny_settings
from train_head.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">$\\frac{&'


def hostile_run(data: Path, features: Path, trained: Settings, folder: Path) -> Path:
    """The report of a copy of the trained run, `tiny`, beside `other`, its copy; on labels with the hostile names."""
    shutil.copytree(features, folder / "features")
    shutil.copytree(Path(trained.runs) / trained.name, folder / "tiny")
    path = folder / "features" / "valid" / "annotations.json"
    labels = json.loads(path.read_text())
    for category in labels["categories"][1:]:  # the detector goes on knowing the first one: the baseline needs one
        category["name"] += HOSTILE
    path.write_text(json.dumps(labels))
    checkpoint = folder / "tiny" / CHECKPOINT
    names = tuple(category["name"] for category in labels["categories"])
    save_checkpoint(checkpoint, replace(load_checkpoint(checkpoint), category_names=names))
    settings = tiny_settings(data, folder / "features", folder, "name=tiny")
    evaluate(settings)
    shutil.copytree(folder / "tiny", folder / "other")
    for run in ("tiny", "other"):
        config = folder / run / "config.yaml"
        config.write_text(config.read_text().replace(str(features), str(folder / "features")))
    return write_report(settings, [folder / "other"])
