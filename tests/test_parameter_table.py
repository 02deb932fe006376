"""The parameter table against the counts recorded from the original code (tests/golden/README.md)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.detector_samples import GOLDEN, key_shapes
from train_head.__main__ import main
from train_head.detector_files import DetectorSizes, sizes_of_architecture
from train_head.parameter_table import head_config_for, head_parameters, ratio

COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())
NAMES = {"R50": "r50", "R101": "r101", "SwinL": "swin-l"}
LAYERS = {"enc6_dec3": (6, 3), "enc3_dec6": (3, 6)}


def words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    monkeypatch.setattr(sys, "argv", ["train_head", "info", *arguments])
    assert main() == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module", params=list(NAMES))
def detector(request: pytest.FixtureRequest) -> tuple[str, DetectorSizes]:
    return request.param, sizes_of_architecture(NAMES[request.param], 40)


@pytest.mark.parametrize("depth", LAYERS)
def test_head_against_detector(detector: tuple[str, DetectorSizes], depth: str) -> None:
    name, sizes = detector
    expected = COUNTS["vita_ytvis2019"][f"{name}_{depth}"]
    enc_layers, dec_layers = LAYERS[depth]
    head = head_parameters(head_config_for(sizes, num_classes=40, enc_layers=enc_layers, dec_layers=dec_layers))
    assert sum(sizes.parameters.values()) == expected["detector"]
    assert head == expected["parts"]
    assert sum(head.values()) == expected["vita_module"]
    assert round(ratio(sizes.parameters, head), 2) == expected["vita_over_detector_pct"]


@pytest.mark.parametrize("name", ["r50", "r101", "swinl"])
def test_parts_of_the_coco_detectors(name: str) -> None:
    expected = COUNTS["mask2former_coco80"][name]
    parts = sizes_of_architecture(name.replace("swinl", "swin-l"), 80).parameters
    assert parts == {part: expected[part] for part in ("backbone", "pixel_decoder", "predictor")}


def test_printed_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row[0], row[1]): row for row in words(monkeypatch, capsys) if row[-1] == "%"}
    assert rows["swin-l", "6+3"][-2:] == ["6.1", "%"]
    assert rows["swin-l", "3+6"][-2:] == ["6.5", "%"]
    assert rows["r50", "6+3"][-4:] == ["43,959,977", "13,175,081", "30.0", "%"]
    assert rows["r50", "3+6"][-4:] == ["43,959,977", "13,966,121", "31.8", "%"]


def test_table_of_a_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and labels are not there: COCO's 80 categories in the detector, 40 in the head."""
    rows = words(monkeypatch, capsys, "ytvis2019_r50", "head.enc_layers=3", "head.dec_layers=6")
    assert ["detector", "(frozen)", "43,970,257"] in rows
    assert ["head", "(trained)", "13,966,121"] in rows
    example = words(monkeypatch, capsys, "ytvis2019_r50", "head.kind=gru")
    assert ["update", f"{2 * 3 * (256 * 256 + 256):,}"] in example  # a GRU cell has three gates


def test_table_of_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = key_shapes("vita_r50_enc3dec6")
    model = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    torch.save({"model": model}, tmp_path / "vita.pth")
    rows = words(monkeypatch, capsys, "--release", str(tmp_path / "vita.pth"))
    assert ["detector", "(frozen)", "43,959,977"] in rows
    assert ["head", "(trained)", "13,966,121"] in rows
    assert ["head", "/", "detector", "31.8", "%"] in rows
