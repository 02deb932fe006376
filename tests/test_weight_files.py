"""Weight files are untrusted: whatever is in them, either plain arrays come out or one clear error."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.errors import WeightsError
from cache.fingerprint import HEAD_FINGERPRINT
from extract.detector.checkpoints import weights_sha256
from extract.detector.frozen import load_detector
from extract.detector.safe_pickle import load_plain_pickle
from tests.detector_samples import checkpoint_bytes, load_sample, write_checkpoint


class RunsCommand:
    """Pickles as a call of os.system, the textbook attack."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


class Evaluates(RunsCommand):
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:  # type: ignore[override]
        return eval, (f"open({str(self.witness)!r}, 'w').close()",)


ATTACKS: dict[str, Callable[[Path], object]] = {
    "os.system": RunsCommand,
    "eval": Evaluates,
    "in a state dict": lambda witness: {"model": {"key": RunsCommand(witness)}},
    "in an array of objects": lambda witness: {"model": {"key": np.array([RunsCommand(witness)], dtype=object)}},
    "in an ordered dict": lambda witness: {"model": OrderedDict(key=Evaluates(witness))},
}


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_files_run_nothing(attack: str, suffix: str, tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / f"model{suffix}"
    content = ATTACKS[attack](witness)
    path.write_bytes(pickle.dumps(content, protocol=2))
    if suffix == ".pth":
        torch.save(content, path)
    with pytest.raises(WeightsError, match="not a readable weight file") as error:
        load_detector(path)
    assert "could run code" in str(error.value)
    assert not witness.exists()


def test_the_attack_would_work_elsewhere(tmp_path: Path) -> None:
    """The witness is a real one: plain pickle falls for it."""
    pickle.loads(pickle.dumps(RunsCommand(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    "gadget",
    [
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x01\x00\x00\x00OtRX\x04\x00\x00\x00evilctR.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x05\x00\x00\x00rot13tR.",
        b"cnumpy\nload\n(X\x01\x00\x00\x00xtR.",
        b"cbuiltins\ngetattr\n.",
        b"X\x01\x00\x00\x00xQ.",  # a persistent id
    ],
)
def test_gadgets_of_allowed_modules_are_refused(gadget: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        load_plain_pickle(io.BytesIO(gadget))


ARRAYS = {
    "float32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "float16": np.linspace(-1, 1, 6, dtype=np.float16),
    "float64": np.array([[np.pi, -np.inf]]),
    "int64": np.array([-(2**62), 5]),
    "bool": np.array([True, False]),
    "column-major": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "big-endian": np.arange(5, dtype=">f4"),
    "empty": np.zeros((0, 7), np.float32),
    "no axes": np.array(3.5, np.float32),
    "scalar": np.float64(2.25),
}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ARRAYS)
def test_plain_arrays_are_read_exactly(kind: str, protocol: int) -> None:
    array = np.asarray(ARRAYS[kind])
    content = {"model": OrderedDict(key=ARRAYS[kind]), "__author__": "somebody", "iteration": 7}
    read = load_plain_pickle(io.BytesIO(pickle.dumps(content, protocol=protocol)))
    assert isinstance(read, dict)
    assert (read["__author__"], read["iteration"]) == ("somebody", 7)
    key = read["model"]["key"]
    assert np.array_equal(key, array)
    assert key.dtype == array.dtype.newbyteorder("=")
    assert key.flags.writeable


def test_arrays_of_python_2_are_read() -> None:
    """Protocol 2 with bytes as text, as the oldest zoo files hold them."""
    data = np.array([1.5, -2.0], "<f4").tobytes()
    written = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(U\x02f4I0\nI1\ntR(I3\nU\x01<NNNI-1\nI-1\nI0\ntbI00\nU\x08" + data + b"tb."
    )
    read = load_plain_pickle(io.BytesIO(b"\x80\x02}U\x01k" + written[2:-1] + b"s."))
    assert isinstance(read, dict)
    assert np.array_equal(read["k"], [1.5, -2.0])


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["r50", "swin"])
def test_truncated_files(name: str, share: float, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path)
    path.write_bytes(checkpoint_bytes(name)[: int(share * len(checkpoint_bytes(name)))])
    with pytest.raises(WeightsError, match="not a readable weight file") as error:
        load_detector(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "got a dict with keys 'state_dict'"),
        ([1, 2], "got a list"),
        ({"model": {1: torch.zeros(1)}}, "not an official checkpoint"),
        ({"model": {}}, "not the weights of a Mask2Former"),
        ({"model": {"fc.weight": torch.zeros(3, 4)}}, "not the weights of a Mask2Former"),
    ],
)
def test_other_content(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=message):
        load_detector(tmp_path / "model.pth")


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no detector weights here"):
        load_detector(tmp_path / "nowhere.pkl")
    with pytest.raises(WeightsError, match="a folder without them"):
        load_detector(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="save the model again as safetensors"):
        load_detector(tmp_path)


def test_a_training_run_in_place_of_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"version": 1, "head": {}, "fingerprint": {}, "detector": {}}, run / "checkpoint.pt")
    (run / HEAD_FINGERPRINT).write_text("{}")
    for weights in (run, run / "checkpoint.pt"):
        with pytest.raises(WeightsError, match=r"detector.weights that .*run/config.yaml names"):
            load_detector(weights)
    (run / "detector").mkdir()
    for weights in (run, run / "checkpoint.pt"):
        with pytest.raises(WeightsError, match=r"detector.weights=.*run/detector"):
            load_detector(weights)


def test_damaged_hugging_face_folder(tmp_path: Path) -> None:
    load_sample("swin", tmp_path).model.save_pretrained(tmp_path / "folder")
    weights = tmp_path / "folder" / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (b"", content[:9], content[:-1]):
        weights.write_bytes(damaged)
        with pytest.raises(WeightsError, match="not a readable Mask2Former folder"):
            load_detector(tmp_path / "folder")
    weights.write_bytes(content)
    for config in ("", "{", '{"model_type": "bert"}', '{"backbone_config": {"model_type": "nonesuch"}}'):
        (tmp_path / "folder" / "config.json").write_text(config)
        with pytest.raises(WeightsError):
            load_detector(tmp_path / "folder")


def test_hash_follows_content_not_path(tmp_path: Path) -> None:
    path = write_checkpoint("r50", tmp_path)
    digest = weights_sha256(path)
    assert digest == hashlib.sha256(checkpoint_bytes("r50")).hexdigest()
    assert weights_sha256(path.rename(tmp_path / "other.pkl")) == digest
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "a.safetensors", "b.safetensors"):
        (folder / name).write_text(name)
    digest = weights_sha256(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "README.md").write_text("not weights")
    assert weights_sha256(copy) == digest
    for name in ("config.json", "b.safetensors"):
        (copy / name).write_text("changed")
        assert weights_sha256(copy) != digest
        (copy / name).write_text(name)
    with pytest.raises(WeightsError, match="no detector weights here"):
        weights_sha256(tmp_path / "nowhere")


def test_a_bomb_in_a_weight_file_is_not_unpacked(tmp_path: Path) -> None:
    """PyTorch stores its entries as they are; one that would unpack to a gigabyte is refused by its size alone."""
    plain, bomb = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"model": {"key": torch.zeros(4)}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            with target.open(entry, "w", force_zip64=True) as stream:
                if entry.endswith("data/0"):
                    for _ in range(64):
                        stream.write(bytes(2**20))
                else:
                    stream.write(source.read(entry))
    assert bomb.stat().st_size < 2**17
    with pytest.raises(WeightsError, match="is compressed, which PyTorch never does"):
        load_detector(bomb)
