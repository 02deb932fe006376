from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from pycocotools.cocoeval import COCOeval

from cache.errors import CacheError, ConfigError
from cache.labels import masks
from cache.labels.tracks import Video
from configs.schema import Settings
from evaluate.compare.runs import LabelFiles, read_entries
from evaluate.metrics.weighted import precision_curves
from evaluate.pictures.charts import drawing, page_svg
from evaluate.pictures.overlays import PALETTE, DrawnTrack, draw_frame, overlay_data_url
from evaluate.report import figures
from evaluate.report.figures import category_bars, learning_curves, similarity_heat_maps
from evaluate.report.scrubber import ScrubbedSide, ScrubbedVideo, scrub_video, within_budget
from evaluate.report.sides import read_sides
from evaluate.report.similarity import SimilarityMatrix, _compare, video_of_many_objects
from evaluate.report.write import write_report
from evaluate.score import percent
from evaluate.stage import evaluate
from evaluate.stored import load_metrics
from evaluate.tables import metrics_table, run_summary
from tests.conftest import tiny_settings
from tests.naive_video_ap import Object
from tests.report_run import HOSTILE, hostile_run
from tests.track_samples import as_files_have_it
from train_head.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from train_head.data.video_sets import open_evaluation_set
from train_head.losses.matcher import ClipMatch


def test_the_similarity_matrix_by_hand() -> None:
    """Object 0 is seen in both frames, object 1 in the first; columns go by object."""
    frames_TQC = torch.tensor([[[0.0, 2.0], [1.0, 0.0], [9.0, 9.0]], [[9.0, 9.0], [9.0, 9.0], [0.0, 1.0]]])
    videos_VC = torch.tensor([[0.0, 1.0], [9.0, 9.0], [1.0, 0.0]])
    matches_TN = torch.tensor([[1, 0], [2, -1]])
    match = ClipMatch(query_DLM=torch.tensor([[[2, 0]]]), object_DLM=torch.tensor([[[0, 1]]]))
    found = _compare((frames_TQC, videos_VC), True, matches_TN, match, "v", ["cat", "dog"])
    assert found is not None and found.row_objects_F.tolist() == [0, 0, 1] and found.column_objects_M.tolist() == [0, 1]
    dots = np.array([[1, 0], [0, 1], [0, 2]])  # the second frame's cat looks like the dog
    assert found.values_FM == pytest.approx(1 / (1 + np.exp(-dots)))
    assert found.agreement == pytest.approx(2 / 3)
    cosines = _compare((frames_TQC, videos_VC), False, matches_TN, match, "v", ["cat", "dog"])
    assert cosines is not None and cosines.values_FM == pytest.approx(dots)
    assert _compare((frames_TQC, videos_VC), True, torch.full((2, 2), -1), match, "v", ["cat", "dog"]) is None


def test_the_similarity_figure_takes_the_video_of_most_objects_up_to_eight() -> None:
    cells = np.ones((1, 1, 1), dtype=bool)

    def chosen(counts: dict[int, int], crowds: dict[int, int]) -> int | None:
        objects = [Object(video=v, category=3, cells=cells, scale=1) for v, n in counts.items() for _ in range(n)]
        objects += [Object(video=v, category=3, cells=cells, scale=1, crowd=True)
                    for v, n in crowds.items() for _ in range(n)]  # fmt: skip
        video = video_of_many_objects(as_files_have_it(list(counts), objects)[0])
        return None if video is None else video.id

    assert chosen({1: 3, 2: 8, 3: 9, 4: 2}, {}) == 2
    assert chosen({1: 3, 2: 1, 3: 2}, {2: 5, 1: 9}) == 1  # crowds do not count
    assert chosen({1: 1, 2: 9}, {1: 1}) is None


def square_tracks() -> list[DrawnTrack]:
    left, whole = np.zeros((9, 9), dtype=np.uint8), np.ones((9, 9), dtype=np.uint8)
    left[:, :5] = 1
    return [
        DrawnTrack(caption="a", segmentations=(masks.encode(left), None)),
        DrawnTrack(caption="b", segmentations=(masks.encode(whole), masks.encode(whole))),
    ]


def test_masks_are_drawn_in_their_tracks_colour_and_the_first_lies_on_top() -> None:
    image = np.full((9, 9, 3), 100, dtype=np.uint8)
    tracks = square_tracks()
    drawn = draw_frame(image, tracks, 0)
    assert np.array_equal(drawn[4, 2], (100 + np.array(PALETTE[0])) // 2)
    assert np.array_equal(drawn[4, 7], (100 + np.array(PALETTE[1])) // 2)
    assert np.array_equal(drawn[4, 4], PALETTE[0])  # the edge of the first
    later = draw_frame(image, tracks, 1)  # the first track is absent, and colours stay
    assert np.array_equal(later[4, 2], (100 + np.array(PALETTE[1])) // 2)
    assert np.array_equal(image, np.full((9, 9, 3), 100))


@pytest.mark.parametrize("frame", [0, 1])
def test_a_see_through_overlay_looks_as_masks_drawn_into_the_frame(frame: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    url = overlay_data_url(square_tracks(), [0, 1], frame, (9, 9), (9, 9))
    overlay = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))).convert("RGBA")
    seen = Image.alpha_composite(Image.fromarray(image).convert("RGBA"), overlay).convert("RGB")
    difference = np.abs(np.asarray(seen).astype(int) - draw_frame(image, square_tracks(), frame))
    assert difference.max() <= 1  # alpha 128 of 255 is not quite a half


def test_a_page_of_too_many_pictures_is_thinned(tmp_path: Path) -> None:
    """Noise, which no JPEG can shrink: 48 frames of 640 x 480 take 14 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    video = Video(id=1, height=480, width=640, length=48, file_names=("noise.jpg",) * 48)
    drawn = scrub_video(video, tmp_path, {"ground truth": []})
    assert drawn.size > 13_000_000
    (kept,) = within_budget([drawn])
    assert 10_000_000 < kept.size <= 12_000_000 and 30 < len(kept.frames) < 48
    assert len(json.dumps(asdict(kept))) < 12_100_000


def test_precision_over_recall_is_that_of_cocoeval(tiny_run: Settings) -> None:
    from evaluate.metrics.video_ap import VideoEvaluation
    from evaluate.stored import load_predictions

    evaluate(tiny_run)
    labels = open_evaluation_set(tiny_run).labels
    predictions = load_predictions(Path(tiny_run.runs) / tiny_run.name, "baseline", labels)
    evaluation = VideoEvaluation(labels, predictions)
    reference: COCOeval = evaluation._coco
    reference.evaluate()
    reference.accumulate()
    expected_TRK = reference.eval["precision"][:, :, :, 0, -1]
    found = (expected_TRK[0, 0] >= 0).nonzero()[0]
    assert len(found) > 1 and expected_TRK[..., found].max() > 0
    assert precision_curves(evaluation.matches) == pytest.approx(expected_TRK[..., found].mean(axis=-1))


def test_tables_print_percentages() -> None:
    row = {"AP": 0.1234, "AP50": None, "AP75": 1.0, "AR1": 0.0, "AR10": 0.5}
    header, line = metrics_table({"head": row}, {}).splitlines()
    assert header.split() == ["AP", "AP50", "AP75", "AR1", "AR10"]
    assert line.split() == ["head", "12.3", "–", "100.0", "0.0", "50.0"]
    assert percent(0.9999) == "100.0"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a report's module makes, laid out as they are saved."""
    made: list[Figure] = []

    def noted(figure: Figure) -> str:
        made.append(figure)
        return page_svg(figure)

    monkeypatch.setattr(figures, "page_svg", noted)
    return made


@pytest.mark.parametrize("objects", [2, 8])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_text_of_a_heat_map_is_cut_off(drawn: list[Figure], count: int, objects: int) -> None:
    matrix = SimilarityMatrix(
        video="v",
        objects=("a category of a long name",) * objects,
        trained=False,
        values_FM=np.eye(objects).repeat(6, axis=0),
        row_objects_F=np.arange(objects).repeat(6),
        column_objects_M=np.arange(objects),
    )
    similarity_heat_maps(
        {f"{index}, a run of the name that a sweep of two settings gives": matrix for index in range(count)}
    )
    (figure,) = drawn
    with drawing():
        figure.draw_without_rendering()
    width, height = figure.bbox.size
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            box = text.get_window_extent()
            assert -1 <= box.x0 <= box.x1 <= width + 1 and -1 <= box.y0 <= box.y1 <= height + 1, text.get_text()


def test_a_curve_of_one_point_is_seen(drawn: list[Figure]) -> None:
    log = [{"step": 20.0, "loss": 3.0, "class": 1.0, "mask": 1.0, "dice": 1.0, "similarity": 1.0}]
    learning_curves({"run": log}, {"run": "C0"})
    learning_curves({"run": [*log, {**log[0], "step": 40.0}]}, {"run": "C0"})
    markers = [{line.get_marker() for axes in figure.axes for line in axes.lines} for figure in drawn]
    assert markers == [{"o"}, {""}]


def test_names_in_any_script_are_drawn_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    svg = category_bars(["猫", "कुत्ता"], {"head": np.array([0.5, 0.2])})
    assert "猫" in svg and not recwarn.list


def test_frames_are_cut_evenly_to_fit_the_budget() -> None:
    side = ScrubbedSide(title="head", legend=(), overlays=("o" * 100,) * 40, visible=((),) * 40)
    video = ScrubbedVideo(
        name="a", length=40, hw=(2, 2), frames=tuple(range(40)), pictures=("p" * 900,) * 40, sides=(side,)
    )
    assert within_budget([video, video], 80_000) == [video, video]
    kept = within_budget([video, video.thinned(20)], 30_000)
    assert 24_000 < sum(each.size for each in kept) <= 30_000
    assert kept[0].frames[0] == 0 and kept[0].frames[-1] == 39
    assert np.ptp(np.diff(kept[0].frames)) <= 1
    for each in kept:
        assert len(each.frames) == len(each.pictures) == len(each.sides[0].overlays) == len(each.sides[0].visible)
    assert [len(each.frames) for each in within_budget([video, video], 10)] == [1, 1]


def test_a_track_takes_the_colour_of_the_object_it_overlaps(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    video = Video(id=1, height=9, width=9, length=1, file_names=("0.png",))
    first, second = np.zeros((2, 9, 9), dtype=np.uint8)
    first[:4], second[6:] = 1, 1
    of = {name: DrawnTrack(caption=name, segmentations=(masks.encode(m),)) for name, m in (("1", first), ("2", second))}
    elsewhere = DrawnTrack(caption="x", segmentations=(masks.encode(np.eye(9, dtype=np.uint8)),))
    drawn = scrub_video(video, tmp_path, {"truth": [of["1"], of["2"]], "head": [elsewhere, of["2"], of["1"]]})
    truth, head = (dict(side.legend) for side in drawn.sides)
    assert head["1"] == truth["1"] and head["2"] == truth["2"] and head["x"] not in truth.values()


def test_names_are_escaped_and_the_page_fetches_nothing(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    page = hostile_run(tiny_data, tiny_cache, tiny_run, tmp_path).read_text()
    assert HOSTILE in page or "&lt;/script&gt;" in page
    body, data = re.split(r'<script type="application/json" id="data">', page)
    assert "<img src=x" not in page and "</script><script>" not in body
    legend = json.loads(data[: data.index("</script>")])["videos"][0]["sides"][0]["legend"]
    assert any(HOSTILE in caption for caption, _ in legend)
    assert "default-src 'none'" in page and not re.search(r'(?:src|href)\s*=\s*"?(?!data:)\w+://', page)
    for figure in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(figure.replace("xlink:", ""))
    assert len(page) < 15_000_000


def test_two_runs_side_by_side_and_refusals(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    evaluate(tiny_run)
    run = Path(tiny_run.runs) / tiny_run.name
    shutil.copytree(run, tmp_path / "other")
    config = (run / "config.yaml").read_text().replace("name: tiny", "name: other")
    (tmp_path / "other" / "config.yaml").write_text(config.replace(f"runs: {tiny_run.runs}", f"runs: {tmp_path}"))
    shutil.copytree(tmp_path / "other", tmp_path / "second" / "other")  # of one name: the page must tell them apart
    page = write_report(tiny_run, [tmp_path / "other", tmp_path / "second" / "other"]).read_text()
    assert 'value="3" checked autocomplete="off"> other' in page and "<li>other: " in page
    assert 'value="4" checked autocomplete="off"> second/other' in page and "<li>second/other: " in page
    assert page.count('<th scope="row">second/other</th>') == 1 and "training of second/other" in page
    with pytest.raises(ConfigError, match="shown already"):
        write_report(tiny_run, [tmp_path / "other", tmp_path / "second" / ".." / "other"])
    missing = tiny_settings(tiny_data, tiny_cache, tmp_path, "name=nobody")
    with pytest.raises(CacheError, match="make evaluate"):
        write_report(missing)
    of_train(tmp_path / "other")
    with pytest.raises(ConfigError, match="same videos"):
        write_report(tiny_run, [tmp_path / "other"])


def of_train(folder: Path) -> None:
    """Pretend that what lies in a folder was predicted for the train split: an empty list fits any."""
    stored = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**stored, "split": "train"}))
    (folder / "results.json").write_text("[]")


def test_without_labels_and_log_the_page_is_written_and_old_scores_go(
    tiny_data: Path, tiny_cache: Path, tiny_run: Settings, tmp_path: Path
) -> None:
    shutil.copytree(tiny_cache, tmp_path / "features")
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / "tiny")
    settings = tiny_settings(tiny_data, tmp_path / "features", tmp_path, "name=tiny")
    evaluate(settings)
    assert load_metrics(tmp_path / "tiny", "head")["AP"] is not None
    path = tmp_path / "features" / "valid" / "annotations.json"
    labels = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in labels.items() if key != "annotations"}))
    (tmp_path / "tiny" / "metrics.jsonl").unlink()  # as of an imported release
    evaluate(settings)
    assert "what is shown" not in write_report(settings).read_text()
    stored = load_metrics(tmp_path / "tiny", "head")
    assert stored["AP"] is None and "per_category" not in stored and stored["split"] == "valid"
    path = tmp_path / "tiny" / CHECKPOINT
    save_checkpoint(path, replace(load_checkpoint(path), step=9))  # trained on since
    page = write_report(settings).read_text()
    assert "what is shown is of step 6, `make evaluate` renews it" in page
    assert "labels of this split are not public" in page and "no log of the training" in page
    assert page.count("<section class=") == 2 and "What the similarity loss did" not in page


def test_methods_of_another_split_are_left_out(tiny_run: Settings, tmp_path: Path) -> None:
    evaluate(tiny_run)
    shutil.copytree(Path(tiny_run.runs) / tiny_run.name, tmp_path / "tiny")
    settings = replace(tiny_run, runs=str(tmp_path))
    for method in ("clips1-greedy", "clips5-greedy"):  # as an ablation leaves them
        shutil.copytree(tmp_path / "tiny" / "baseline", tmp_path / "tiny" / method)
    videos = open_evaluation_set(settings)
    assert [side.method for side in read_sides(settings, videos, [])] == ["head", "baseline"]  # others on request
    asked = ["clips1-greedy", "clips5-greedy"]
    assert [side.method for side in read_sides(settings, videos, [], asked)] == ["head", *asked]
    assert [e.method for e in read_entries(tmp_path / "tiny", None, LabelFiles())] == ["head", "baseline"]
    assert [e.method for e in read_entries(tmp_path / "tiny", asked, LabelFiles())] == ["head", *asked]
    of_train(tmp_path / "tiny" / "clips5-greedy")
    assert [side.title for side in read_sides(settings, videos, [])] == ["head", "baseline"]
    for read in (
        lambda: read_sides(settings, videos, [], ["clips5-greedy"]),
        lambda: read_entries(tmp_path / "tiny", ["clips5-greedy"], LabelFiles()),
    ):
        with pytest.raises(CacheError, match=r"clips5-greedy are of another split \(expected valid, got train\)"):
            read()
    assert "clips5-greedy" not in run_summary(settings)
    assert [entry.method for entry in read_entries(tmp_path / "tiny", None, LabelFiles())] == ["head", "baseline"]
    of_train(tmp_path / "tiny")
    assert read_entries(tmp_path / "tiny", [], LabelFiles())[0].split == "train"
    with pytest.raises(CacheError, match="split valid"):
        read_sides(settings, videos, [])


def test_without_frames_the_page_says_so(tiny_cache: Path, tiny_run: Settings, tmp_path: Path) -> None:
    evaluate(tiny_run)
    elsewhere = tiny_settings(tmp_path, tiny_cache, Path(tiny_run.runs), "name=tiny")
    page = write_report(elsewhere).read_text()
    assert "Without pictures" in page and "data.root" in page and '<h2 id="metrics">' in page
    assert "detector.short_edge=null\n" in page  # settings as a command line understands them
