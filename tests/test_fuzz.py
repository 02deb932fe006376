"""Damaged bytes of every kind of file that is read: one clear error or the same content, never something else.

FUZZ_EXAMPLES sets the number of examples of each test (`make fuzz` takes 5,000 and prints what became of them).
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache.codecs import codec_identity
from cache.errors import AnnotationError, VitaCacheError, WeightsError
from cache.labels import masks
from cache.labels.annotations import load_labels
from cache.labels.tracks import Labels
from cache.reader import FeatureCache
from cache.upkeep.transfer import export_hdf5
from evaluate.results import TrackPrediction, load_results, write_results
from extract.detector.checkpoints import read_model
from tests.cache_samples import FINGERPRINT, fitted_codec, open_writer, write_video
from train_head.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train_head.heads.contract import HeadConfig
from train_head.heads.vita import VitaHead

GOLDEN = Path(__file__).parent / "golden" / "ytvis_eval"
NUM_FRAMES = 5
Damage = Callable[[bytes], bytes]

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def _damage(kind: str, place: float, size: int, value: int) -> Damage:
    def apply(content: bytes) -> bytes:
        at = min(int(place * len(content)), max(0, len(content) - 1))
        match kind:
            case "flip":
                return content[:at] + bytes([content[at] ^ (1 << value % 8)]) + content[at + 1 :] if content else b""
            case "overwrite":
                return content[:at] + bytes([value]) * min(size, len(content) - at) + content[at + size :]
            case "insert":
                return content[:at] + bytes([value]) * size + content[at:]
            case "repeat":
                return content[: at + size] + content[at:]
            case "delete":
                return content[:at] + content[at + size :]
        return content[:at]

    return apply


DAMAGE = st.builds(
    _damage,
    st.sampled_from(["flip", "flip", "overwrite", "insert", "repeat", "delete", "truncate"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 40),
    st.integers(0, 255),
)


@pytest.fixture(scope="module", params=["float16", "logit", "logit.h5"])
def features(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache without and one with compression and fitted arrays, in a folder, and the latter in an HDF5 file."""
    codec, _, file = request.param.partition(".")
    path = tmp_path_factory.mktemp("fuzz") / "features"
    write_video(open_writer(path, codec=fitted_codec(codec)), "7", NUM_FRAMES)
    if file:
        export_hdf5(FeatureCache.open(path), path.with_suffix(".h5"))
        path = path.with_suffix(".h5")
    return path


def _read_all(path: Path) -> list[NDArray[Any]]:
    """What is stored of the frames, and by which arrays it is understood."""
    feature_cache = FeatureCache.open(path)
    video, codec = feature_cache.video("7"), feature_cache.codec
    arrays = [np.frombuffer(codec_identity(codec).encode(), np.uint8)]  # of its arrays and parameters
    return [video.frame_queries(range(NUM_FRAMES)), video.mask_features(range(NUM_FRAMES)), *arrays]


@given(damage=DAMAGE, pick=st.integers(0, 10**6), anywhere=st.booleans())
@fuzz
def test_a_damaged_cache(features: Path, damage: Damage, pick: int, anywhere: bool) -> None:
    truth = _read_all(features)
    copied = features.with_stem("copy")
    if features.is_dir():
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(features, copied)
        below = copied if anywhere else copied / "videos" / "7"
        files = sorted(file for file in below.rglob("*") if file.is_file())
        file = files[pick % len(files)]
    else:
        file = Path(shutil.copy(features, copied))
    file.write_bytes(damage(file.read_bytes()))
    try:
        found = _read_all(copied)
    except VitaCacheError as error:
        event(f"refused: {type(error).__name__}")
        return
    event(f"harmless, in {file.name}")
    for array, true in zip(found, truth, strict=True):
        np.testing.assert_array_equal(array, true)


@given(damage=DAMAGE)
@fuzz
def test_a_damaged_label_file(tmp_path_factory: pytest.TempPathFactory, damage: Damage) -> None:
    content = (GOLDEN / "gt.json").read_bytes()
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(damage(content))
    try:
        labels = load_labels(path)
    except AnnotationError:
        event("refused")
        return
    event("accepted")
    if json.loads(path.read_bytes()) == json.loads(content):
        assert labels == golden_labels()


def _naive_runs(text: str) -> list[int] | None:
    """Decode COCO's compressed counts one character at a time; None where the text is no such code."""
    runs: list[int] = []
    at = 0
    while at < len(text):
        number, shift = 0, 0
        while True:
            if at >= len(text) or not 0 <= ord(text[at]) - 48 < 64:
                return None
            code = ord(text[at]) - 48
            number |= (code & 31) << shift
            shift, at = shift + 5, at + 1
            if not code & 32:
                break
        number -= (1 << shift) if code & 16 else 0
        runs.append(number + runs[-2] if len(runs) > 2 else number)
    return runs


ANY_TEXT = st.text(st.characters(min_codepoint=46, max_codepoint=114), min_size=0, max_size=12)
SOUND_TEXT = st.lists(st.booleans(), min_size=12, max_size=12).map(
    lambda pixels: masks.encode(np.array(pixels).reshape(3, 4)).counts
)


@given(
    text=ANY_TEXT
    | SOUND_TEXT
    | st.builds(lambda damage, text: damage(text.encode()).decode("latin-1"), DAMAGE, SOUND_TEXT)
)
@fuzz
def test_run_lengths_of_any_text(text: str) -> None:
    runs = _naive_runs(text)
    sound = bool(runs) and min(runs or [-1]) >= 0 and sum(runs or []) == 12
    try:
        (rle,) = masks.from_counts([text], 3, 4)
    except ValueError:
        event("refused")
        assert not sound
        return
    event("accepted")
    assert sound and runs is not None
    column_major = np.repeat(np.arange(len(runs)) % 2, runs)
    np.testing.assert_array_equal(masks.mask(rle), column_major.reshape(4, 3).T)


@given(runs=st.lists(st.integers(-2, 2**65), max_size=6) | st.lists(st.integers(0, 4), min_size=4, max_size=9))
@fuzz
def test_run_lengths_of_any_numbers(runs: list[int]) -> None:
    sound = bool(runs) and min(runs) >= 0 and sum(runs) == 12
    try:
        (rle,) = masks.from_counts([runs], 3, 4)
    except ValueError:
        event("refused")
        assert not sound
        return
    event("accepted")
    assert sound
    np.testing.assert_array_equal(masks.mask(rle), np.repeat(np.arange(len(runs)) % 2, runs).reshape(4, 3).T)


@functools.cache
def golden_labels() -> Labels:
    return load_labels(GOLDEN / "gt.json")


@functools.cache
def golden_results() -> list[TrackPrediction]:
    return load_results(GOLDEN / "results.json", golden_labels())[:6]


@given(damage=DAMAGE, suffix=st.sampled_from([".json", ".zip"]))
@fuzz
def test_a_damaged_result_file(tmp_path_factory: pytest.TempPathFactory, damage: Damage, suffix: str) -> None:
    labels = golden_labels()
    truth = golden_results()
    path = tmp_path_factory.getbasetemp() / "results.json"
    write_results(path, truth)
    path = path.with_suffix(suffix)
    path.write_bytes(damage(path.read_bytes()))
    try:
        found = load_results(path, labels)
    except AnnotationError:
        event("refused")
        return
    event("accepted")
    if suffix == ".zip":  # the archive has a checksum, JSON has none
        assert found == truth


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = HeadConfig(
        num_classes=2, hidden_dim=8, mask_dim=8, num_queries=2, num_heads=2, ffn_dim=8, enc_layers=1, dec_layers=1
    )
    path = tmp_path_factory.mktemp("fuzz_head") / "checkpoint.pt"
    state = VitaHead(config).state_dict()
    names = ("a", "b")
    fields = {"config": config, "head": state, "optimizer": {}, "fingerprint": FINGERPRINT, "category_names": names}
    save_checkpoint(path, Checkpoint(step=3, seconds=1.0, **fields))  # type: ignore[arg-type]
    return path


@given(damage=DAMAGE)
@fuzz
def test_a_damaged_checkpoint(checkpoint: Path, damage: Damage) -> None:
    truth = load_checkpoint(checkpoint)
    damaged = checkpoint.with_name("damaged.pt")
    damaged.write_bytes(damage(checkpoint.read_bytes()))
    try:
        found = load_checkpoint(damaged)
    except WeightsError:
        event("refused")
        return
    event("accepted")
    assert (found.step, found.config, found.fingerprint) == (truth.step, truth.config, truth.fingerprint)
    assert all(torch.equal(found.head[name], tensor) for name, tensor in truth.head.items())


@given(damage=DAMAGE, suffix=st.sampled_from([".pth", ".pkl"]))
@fuzz
def test_a_damaged_weight_file(tmp_path_factory: pytest.TempPathFactory, damage: Damage, suffix: str) -> None:
    state = {f"layer.{index}": torch.arange(40.0) + index for index in range(4)}
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}}))
    path.write_bytes(damage(path.read_bytes()))
    try:
        found = read_model(path)
    except WeightsError:
        event("refused")
        return
    event("accepted")
    if suffix == ".pth":  # a pickle has no checksum: its bytes are told apart by the fingerprint's SHA-256 alone
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
