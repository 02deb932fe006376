from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cache.errors import CacheError, ConfigError
from evaluate.pictures.charts import drawing
from evaluate.pictures.plot import convergence, gap, plot, read_ablation, read_convergence, read_gap


def run_with_ap(folder: Path, aps: dict[int, float]) -> Path:
    folder.mkdir()
    lines = [{"step": 1, "loss": 2.0}, *({"step": step, "AP": ap} for step, ap in aps.items())]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_convergence_is_mean_and_deviation_over_seeds_at_common_steps(tmp_path: Path) -> None:
    run_with_ap(tmp_path / "sim_0", {10: 0.1, 20: 0.3, 30: 0.5})
    run_with_ap(tmp_path / "sim_1", {10: 0.2, 20: 0.5})
    seeds = read_convergence(f"with={tmp_path}/sim_*")
    assert seeds.name == "with" and seeds.places == (10, 20)
    assert seeds.mean_P == pytest.approx([0.15, 0.4])
    assert seeds.std_P == pytest.approx([0.05 * 2**0.5, 0.1 * 2**0.5])  # of two numbers: half their distance times √2
    with drawing():
        (axes,) = convergence([seeds]).axes
    assert axes.lines[0].get_ydata() == pytest.approx([15, 40])
    one = read_convergence(str(tmp_path / "sim_1"))
    assert one.name == "sim_1" and not one.std_P.any()


def test_ablations_are_read_by_variant(tmp_path: Path) -> None:
    for number, ap in enumerate((0.2, 0.4)):
        rows = [
            {"variant": v, "metrics": {"AP": ap * k}, "frames_per_second": 10.0 * k}
            for k, v in ((1, "W = 3"), (2, "all"))
        ]
        (tmp_path / f"r{number}").mkdir()
        (tmp_path / f"r{number}" / "ablate_windows.json").write_text(json.dumps({"split": "valid", "rows": rows}))
    aps, speeds = read_ablation(f"head={tmp_path}/r*", "windows")
    assert aps.places == ("W = 3", "all") and aps.mean_P == pytest.approx([30, 60])
    assert speeds.mean_P == pytest.approx([10, 20])
    with pytest.raises(CacheError, match="evaluate ablate pruning"):
        read_ablation(str(tmp_path / "r0"), "pruning")


def comparison(path: Path, aps: dict[str, float]) -> Path:
    rows = [{"name": n, "metrics": {"AP": {"interval": {"value": ap}, "spread": None}}} for n, ap in aps.items()]
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_gap_closed_is_the_share_of_the_difference(tmp_path: Path) -> None:
    rows = read_gap(comparison(tmp_path / "c.json", {"frozen": 0.40, "views": 0.43, "tuned": 0.50}))
    with drawing():
        (axes,) = gap(rows, "frozen", "tuned").axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([30])


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_every_format_is_written(ending: str, tmp_path: Path) -> None:
    source = run_with_ap(tmp_path / "r", {10: 0.1, 20: 0.2})
    written = plot("convergence", [str(source)], tmp_path / "new" / f"fig5.{ending}")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert written.read_bytes().startswith(start)
    if ending == "png":
        assert min(Image.open(written).size) > 700  # sharp in print


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    silent = run_with_ap(tmp_path / "silent", {})
    with pytest.raises(CacheError, match="evaluate_every"):
        plot("convergence", [str(silent)], tmp_path / "a.png")
    with pytest.raises(CacheError, match="no such run"):
        plot("convergence", ["x=nowhere"], tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"\.svg"):
        plot("convergence", [str(silent)], tmp_path / "a.gif")
    path = comparison(tmp_path / "c.json", {"a": 0.1, "b": 0.2})
    with pytest.raises(ConfigError, match="a, b"):
        plot("gap", [str(path)], tmp_path / "a.png", low="z")
    with pytest.raises(CacheError, match="compare RUNS"):
        plot("gap", [str(silent / "metrics.jsonl")], tmp_path / "a.png")
