"""Fine-tuning the detector: the same losses as from a cache, L_f against the library's own loss, resume, export."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from cache.codecs.float16 import Float16
from cache.errors import ConfigError, FingerprintMismatch, WeightsError
from cache.labels import masks
from cache.labels.stills import load_stills
from cache.labels.tracks import Video
from cache.media.geometry import Transform
from configs.schema import Decoder, Settings
from configs.splits import train_split
from evaluate.compare.runs import LabelFiles, read_entries
from evaluate.stage import evaluate
from extract.demo.stills import write_stills
from extract.detector.checkpoints import weights_sha256
from extract.detector.engines import configured_detector
from extract.detector.frozen import load_detector, normalise_and_pad
from extract.detector.loading import load_model
from extract.detector.trainable import TrainableDetector, with_classes
from extract.fingerprint import fingerprint
from extract.stage import extract
from tests.conftest import tiny_settings
from tests.train_until import interrupt
from train_head.__main__ import main
from train_head.build import trained_parameters
from train_head.checkpoint import CHECKPOINT, load_checkpoint
from train_head.data.clip_labels import read_targets
from train_head.data.image_sets import FrameFolder
from train_head.data.live_clips import LiveClip
from train_head.data.sources import CachedSource
from train_head.data.video_sets import open_training_set
from train_head.joint import DETECTOR, LiveSource, finetune
from train_head.run_folder import open_run
from train_head.step import StepLosses
from train_head.trainer import Trainer, train

CPU = torch.device("cpu")
DEMO_DETECTOR = Path(__file__).parent.parent / "extract" / "demo" / "detector"
SMALL = (
    *("train.num_frames=2", "train.iterations=2", "train.checkpoint_every=2", "train.learning_rate=1e-4"),
    *("finetune.short_edges=[64,72]", "finetune.resize_edges=[90]", "finetune.crop_sides=[64,90]"),
)


def test_a_detector_is_there_while_the_older_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, folder = TrainableDetector(load_model(DEMO_DETECTOR, architecture=None).model), tmp_path / "detector"
    detector.save(folder)

    def killed(path: Path, ignore_errors: bool) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as removing:
        removing.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            detector.save(folder)
    assert weights_sha256(folder)
    detector.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


def small(data: Path, features: Path, runs: Path, *overrides: str) -> Settings:
    return tiny_settings(data, features, runs, *SMALL, *overrides)


def open_trainer(settings: Settings) -> Trainer[LiveClip]:
    source = LiveSource(settings, CPU)
    return Trainer(settings, source, open_run(settings, source.holdout))


def test_live_and_cached_features_give_one_loss(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """The cache rounds features to float16, 2^-12 of a value at most: the losses differ by 5e-4 of theirs at most.

    With live features rounded alike, only the order of sums is left: frames go through the detector in other batches.
    """
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path, "loss.num_points=500")
    cached = CachedSource(settings, open_training_set(settings), CPU)
    live = LiveSource(settings, CPU, augment=False)
    trainer = Trainer(settings, cached, tmp_path)
    step, indices = trainer.compute, (0, 3)
    clips, live_clips = ([source.clips().read(i, np.empty) for i in indices] for source in (cached, live))
    targets = [cached.targets(clip) for clip in clips]
    for clip, live_clip in zip(clips, live_clips, strict=True):
        assert (clip.name, clip.frames) == (live_clip.name, live_clip.frames)
        assert torch.equal(clip.targets.masks_NThw, live_clip.targets.masks_NThw)
    normalisers = step.normalisers(targets)
    with torch.no_grad():
        stored = cached.features(clips, targets, normalisers.frames)
        found = replace(live.features(live_clips, targets, normalisers.frames), targets=targets)
        rounded = replace(found, maps=[map_TRHW.half() for map_TRHW in found.maps])
        expected = step.head_losses(trainer.head, clips, stored, normalisers.clips)
        exact = step.head_losses(trainer.head, clips, found, normalisers.clips)
        alike = step.head_losses(trainer.head, clips, rounded, normalisers.clips)
    for ours, theirs in zip(found.maps, stored.maps, strict=True):
        torch.testing.assert_close(ours.half(), theirs, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.frame_queries_LBTQC, stored.frame_queries_LBTQC, rtol=2e-3, atol=2e-3)
    assert float(exact.total) == pytest.approx(float(expected.total), rel=5e-4)
    assert float(alike.total) == pytest.approx(float(expected.total), rel=2e-4)
    assert float(exact.similarity) == pytest.approx(float(expected.similarity), rel=2e-3)


def library_loss(model: Mask2FormerForUniversalSegmentation, clip: LiveClip) -> float:
    """The loss of `transformers` for a clip's frames, on the same padded canvas."""
    masks, labels = [], []
    for frame, present_N in enumerate(clip.targets.present_NT.t()):
        masks.append(clip.targets.masks_NThw[present_N, frame].float())
        labels.append(clip.targets.labels_N[present_N])
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        pixels = normalise_and_pad(clip.images_T3HW.float())
        return float(model(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss)


def unpadded_clip(source: LiveSource, video: Video) -> LiveClip:
    """One frame at a size of the canvas: in padding, which ours ignores, the library draws points too."""
    transform = Transform.resize((video.height, video.width), (96, 128))
    image = transform.on_image(FrameFolder(path=train_split(source.settings).frames)(video, 0))
    return LiveClip(
        index=video.id,
        name=video.name,
        frames=(0,),
        images_T3HW=torch.from_numpy(np.array(image)).permute(2, 0, 1)[None],
        targets=read_targets(source.labels, video.id, [0], [transform]),
    )


def test_frame_losses_are_the_library_s(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """Both draw their own points, of which there are many: 2 % is what is left of the sampling."""
    words = "loss.num_points=6000", "finetune.frames_only=true"
    source = LiveSource(small(tiny_data, tiny_cache, tmp_path, *words), CPU)
    model = source.detector.model
    model.criterion.num_points = model.criterion.matcher.num_points = 6000
    model.criterion.num_labels = len(source.labels.categories)
    model.weight_dict = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    model.criterion.matcher.cost_class = 2.0
    trainer = Trainer(source.settings, source, tmp_path)
    for video in source.labels.videos[:2]:
        clip = unpadded_clip(source, video)
        assert clip.targets.num_objects
        ours = float(trainer.compute.gradients(trainer.head, [clip])[0])
        assert ours == pytest.approx(library_loss(model, clip), rel=0.02)


def test_joint_training_moves_every_part_at_its_own_rate(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    words = ("finetune.detector_rate=0.5", "finetune.backbone_rate=0.2")
    trainer = open_trainer(small(tiny_data, tiny_cache, tmp_path, *words))
    before = {name: tensor.clone() for name, tensor in trainer.source.state().items()}
    clips = next(trainer._batches())
    losses = trainer.training_step(clips)
    for parameter in trained_parameters(trainer.parts):
        assert parameter.grad is not None
    assert 0 < losses.frames < losses.loss
    factors = [group["lr"] / trainer._rate(-1) for group in trainer.optimizer.param_groups]
    assert factors == pytest.approx([1, 1, 0.5, 0.5, 0.1, 0.1])
    changed = {name for name, tensor in trainer.source.state().items() if not torch.equal(tensor, before[name])}
    batch_norms = {name for name in before if name.startswith("backbone.") and ".norm." in name}
    assert not changed & batch_norms
    assert len(before) - len(batch_norms) - len(changed) <= 2  # biases whose gradient is zero


def test_accumulated_clips_give_the_gradients_of_one_batch(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """Micro-batches, and so processes, divide by the whole batch's objects, queries and pairs."""
    gradients = []
    for accumulate in (1, 2):
        trainer = open_trainer(
            small(tiny_data, tiny_cache, tmp_path / str(accumulate), f"train.accumulate={accumulate}")
        )
        trainer.compute.gradients(trainer.head, next(trainer._batches()))
        gradients.append([p.grad for p in trained_parameters(trainer.parts) if p.grad is not None])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()) + 1e-7)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    whole, broken = (small(tiny_data, tiny_cache, tmp_path, f"name={name}") for name in ("whole", "broken"))
    finetune(whole)
    first = open_trainer(broken)
    first.training_step(next(first._batches()))
    first.save()
    assert load_checkpoint(tmp_path / "broken" / CHECKPOINT).fingerprint.weights_sha256 == "not exported yet"
    finetune(broken)
    expected, resumed = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "broken"))
    assert resumed.step == expected.step == 2
    for ours, theirs in ((resumed.head, expected.head), (resumed.detector, expected.detector)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.fingerprint == expected.fingerprint
    with pytest.raises(FingerprintMismatch, match="detector weights"):
        train(whole)


def test_a_run_killed_while_it_exports_exports_later(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(tiny_data, tiny_cache, tmp_path, "name=killed", "train.checkpoint_every=1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LiveSource, "finish", lambda *_: interrupt())
        finetune(settings)
    run = finetune(settings)
    assert load_checkpoint(run / CHECKPOINT).fingerprint.weights_sha256 == weights_sha256(run / DETECTOR)


@pytest.mark.parametrize("decoder", list(Decoder))
def test_the_fingerprint_is_that_of_the_cache_that_its_detector_will_fill(
    decoder: Decoder, tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    settings = small(tiny_data, tiny_cache, tmp_path, f"detector.decoder={decoder.value}")
    composed = fingerprint(settings, configured_detector(settings), "not exported yet", Float16())
    assert LiveSource(settings, torch.device("cpu")).fingerprint == composed
    assert composed.decoder == decoder.value


def features_of(weights: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    features = load_detector(weights).features(images)
    return features.frame_queries_BLQC, features.mask_features_BCHW


def test_the_result_is_a_detector_and_a_head_for_its_caches(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(tiny_data, tiny_cache, tmp_path, "name=joint")
    run = finetune(settings)
    names = [category.name for category in open_training_set(settings).labels.categories]
    assert load_detector(run / DETECTOR).category_names == tuple(names)
    own = small(tiny_data, tmp_path / "cache", tmp_path, "name=joint", f"detector.weights={run / DETECTOR}")
    extract(own)
    assert evaluate(own).metrics["head"] is not None
    later = replace(own, name="later")
    train(later)
    evaluate(later)
    joint, alone = load_checkpoint(run / CHECKPOINT), load_checkpoint(tmp_path / "later" / CHECKPOINT)
    (entry,) = read_entries(tmp_path / "later", [], LabelFiles())
    frozen = [name for name in joint.detector if name.startswith("backbone.") and ".norm." in name]  # batch norms
    assert len(frozen) == 16 * 4
    trained = [tensor for name, tensor in joint.detector.items() if name not in frozen]
    tensors = (*alone.head.values(), *joint.head.values(), *trained)
    assert entry.costs.trainable_parameters == sum(tensor.numel() for tensor in tensors)
    assert entry.costs.training_seconds == alone.seconds + joint.seconds
    with pytest.raises(FingerprintMismatch, match="detector weights"):
        evaluate(settings)
    official = tmp_path / "vita.pth"
    monkeypatch.setattr(sys, "argv", ["train_head", "export-release", str(run), str(official)])
    assert main() == 0
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 64, 96), dtype=np.uint8))
    for ours, theirs in zip(features_of(official, images), features_of(run / DETECTOR, images), strict=True):
        assert torch.equal(ours, theirs)
    output = tmp_path / "imported"
    arguments = ["import-release", official, "--output", output, "--cache", tmp_path / "cache" / "train"]
    monkeypatch.setattr(sys, "argv", ["train_head", *map(str, arguments)])
    assert main() == 0
    trained, imported = load_checkpoint(run / CHECKPOINT), load_checkpoint(output / CHECKPOINT)
    assert all(torch.equal(imported.head[name], tensor) for name, tensor in trained.head.items())


def test_a_detector_alone_is_trained_on_frames(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    settings = small(tiny_data, tiny_cache, tmp_path, "name=alone", "finetune.frames_only=true")
    run = finetune(settings)
    checkpoint = load_checkpoint(run / CHECKPOINT)
    assert not checkpoint.head and checkpoint.detector
    with pytest.raises(WeightsError, match="detector alone"):
        checkpoint.build_head("cpu")


def test_classes_of_the_data_set_start_from_the_detector_s_own() -> None:
    loaded = load_model(DEMO_DETECTOR, architecture=None)
    before = loaded.model.class_predictor
    model = with_classes(loaded.model, ("new", "old"), [(1, 2)], seed=0)
    after = model.class_predictor
    assert after.weight.shape == (3, before.in_features)
    assert torch.equal(after.weight[1:], before.weight[[2, -1]]) and torch.equal(after.bias[1:], before.bias[[2, -1]])
    assert not torch.equal(after.weight[0], before.weight[0])


def with_stills(data: Path, features: Path, tmp_path: Path) -> Settings:
    """Settings that mix pseudo-videos of six images with the tiny data."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    write_stills(root, 6)
    words = ["pseudo.ratio=1", "pseudo.labels=stills.json", "pseudo.images=stills", "pseudo.resize_edges=[90]"]
    words += ["pseudo.crop_sides=[64,90]", "pseudo.short_edges=[64]"]
    return small(root, features, tmp_path, *words)


def test_pseudo_videos_are_mixed_in(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    source = LiveSource(with_stills(tiny_data, tiny_cache, tmp_path), CPU)
    clips = source.clips()
    drawn = [clips.stream.draw(index) for index in range(10)]
    assert [found.source for found in drawn].count(1) == 5
    clip = clips.read(next(index for index, found in enumerate(drawn) if found.source == 1), np.empty)
    assert min(clip.images_T3HW.shape[-2:]) == 64 and clip.targets.image_hw == tuple(clip.images_T3HW.shape[-2:])
    trainer = Trainer(source.settings, source, tmp_path)
    assert StepLosses.read(trainer.compute.gradients(trainer.head, [clip]), torch.tensor(0.0)).frames > 0


def test_every_clip_cuts_its_image_out_anew_and_the_labels_follow(
    tiny_data: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """Images that are white where a labelled object is, black elsewhere, say themselves what their labels are."""
    source = LiveSource(with_stills(tiny_data, tiny_cache, tmp_path), CPU)
    stills = load_stills(tmp_path / "data" / "stills.json")
    known = {category.name for category in source.labels.categories}
    shown = {category.id for category in stills.categories if category.name in known}
    for still in stills.stills:
        hw = (still.height, still.width)
        found = [masks.mask(o.mask(*hw)) for o in still.objects if o.category_id in shown]
        white = 255 * np.max([np.zeros(hw, np.uint8), *found], axis=0)
        Image.fromarray(white).save(tmp_path / "data" / "stills" / still.file_name)
    clips = source.clips()
    drawn = [(i, found) for i in range(60) if (found := clips.stream.draw(i)).source == 1]
    first, video_id = drawn[0][0], drawn[0][1].video_id
    later = next(i for i, found in drawn[1:] if found.video_id == video_id)  # of another epoch
    one, again, other = (clips.read(number, np.empty) for number in (first, first, later))
    assert torch.equal(one.images_T3HW, again.images_T3HW) and torch.equal(
        one.targets.masks_NThw, again.targets.masks_NThw
    )
    assert not torch.equal(one.images_T3HW[0], one.images_T3HW[1])
    assert one.images_T3HW.shape != other.images_T3HW.shape or not torch.equal(one.images_T3HW, other.images_T3HW)
    for clip in (one, other):
        labelled_Thw = clip.targets.masks_NThw.amax(dim=0) > 0
        white_Thw = clip.images_T3HW[:, 0] > 127
        assert labelled_Thw.any() and not labelled_Thw.all()
        assert float((labelled_Thw == white_Thw).float().mean()) > 0.97


def test_impossible_settings_are_refused(tiny_data: Path, tiny_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate_every"):
        finetune(small(tiny_data, tiny_cache, tmp_path, "train.evaluate_every=1"))
