from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from cache.errors import CacheError, ConfigError
from evaluate.pictures.charts import drawing
from evaluate.plot import AXES, convergence, gap, plot, read_ablation, read_convergence, read_gap, variants


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


def ablation(folder: Path, what: str, aps: dict[str, float | None]) -> Path:
    rows = [
        {"variant": variant, "metrics": {"AP": ap}, "frames_per_second": 10.0 * number}
        for number, (variant, ap) in enumerate(aps.items(), start=1)
    ]
    folder.mkdir(exist_ok=True)
    (folder / f"ablate_{what}.json").write_text(json.dumps({"split": "valid", "rows": rows}))
    return folder


def test_ablations_are_drawn_by_variant(tmp_path: Path) -> None:
    for number, ap in enumerate((0.2, 0.4)):
        ablation(tmp_path / f"r{number}", "windows", {"W = 3": ap, "W = all": 2 * ap})
    aps, speeds = read_ablation(f"head={tmp_path}/r*", "windows")
    assert aps.places == ("3", "all") and aps.mean_P == pytest.approx([30, 60])
    assert speeds.mean_P == pytest.approx([10, 20])
    with drawing():
        figure = variants({"AP": [aps], "Frames per second": [speeds]}, AXES["windows"])
    left, right = figure.axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["3", "all"]
    assert left.get_xlabel() == right.get_xlabel() == "Encoder window (frames)"
    assert left.lines[0].get_ydata() == pytest.approx([30, 60]) and right.get_ylim()[0] == 0
    with pytest.raises(CacheError, match="evaluate ablate pruning"):
        read_ablation(str(tmp_path / "r0"), "pruning")


def test_shares_are_numbers_and_an_undefined_ap_is_no_zero(tmp_path: Path) -> None:
    aps, _ = read_ablation(str(ablation(tmp_path / "r", "pruning", {"kept 1.00": 0.5, "kept 0.25": None})), "pruning")
    assert aps.places == (1.0, 0.25) and aps.mean_P == pytest.approx([50, math.nan], nan_ok=True)
    rows = read_gap(comparison(tmp_path / "c.json", {"frozen": 0.4, "views": None, "tuned": 0.5}))
    with drawing():
        (axes,) = gap(rows, "frozen", "tuned").axes
    assert math.isnan(axes.patches[0].get_width())


def comparison(path: Path, aps: dict[str, float | None]) -> Path:
    rows = [{"name": n, "metrics": {"AP": {"interval": {"value": ap}, "spread": None}}} for n, ap in aps.items()]
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_gap_closed_is_the_share_of_the_difference(tmp_path: Path) -> None:
    rows = read_gap(comparison(tmp_path / "c.json", {"frozen": 0.40, "views": 0.43, "tuned": 0.50}))
    with drawing():
        (axes,) = gap(rows, "frozen", "tuned").axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([30])


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
@pytest.mark.parametrize("what", ["convergence", "windows", "pruning", "gap"])
def test_every_format_is_written(what: str, ending: str, tmp_path: Path) -> None:
    source = run_with_ap(tmp_path / "r", {10: 0.1, 20: 0.2})
    ablation(source, "windows", {"W = 3": 0.1, "W = all": 0.2})
    ablation(source, "pruning", {"kept 1.00": 0.1, "kept 0.25": None})
    if what == "gap":
        source = comparison(tmp_path / "c.json", {"frozen": 0.1, "views": 0.12, "tuned": 0.2, "nothing": None})
    written = plot(what, [str(source)], tmp_path / "new" / f"figure.{ending}")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert written.read_bytes().startswith(start)
    if ending == "png":
        assert max(Image.open(written).size) > 1400  # sharp in print


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
    with pytest.raises(ConfigError, match="one comparison"):
        plot("gap", [str(path), str(path)], tmp_path / "a.png")
    with pytest.raises(ConfigError, match="gap alone"):
        plot("convergence", [str(silent)], tmp_path / "a.png", high="b")
    nothing = comparison(tmp_path / "d.json", {"a": None, "b": 0.2})
    with pytest.raises(ConfigError, match=r"no gap .*AP – of a, AP 20\.0 of b"):
        plot("gap", [str(nothing)], tmp_path / "a.png")
    with pytest.raises(CacheError, match="compare RUNS"):
        plot("gap", [str(silent / "metrics.jsonl")], tmp_path / "a.png")
