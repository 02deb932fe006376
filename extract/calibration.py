"""Fitting and choosing the codec before extraction, on a seeded sample of frames spread over the videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.codecs import Codec
from cache.codecs.fit import Statistics, StatisticsAccumulator
from cache.codecs.float16 import Float16
from cache.codecs.int8 import Int8
from cache.codecs.logit import Logit
from cache.codecs.rate_distortion import (
    Calibration,
    Distortion,
    choice_in_words,
    format_table,
    read_calibration,
    smallest_faithful,
)
from cache.codecs.spectral import Spectral
from cache.errors import AnnotationError, FingerprintMismatch, FrameError, shown
from cache.labels.tracks import Video
from cache.layout import Size, crop_map
from cache.media.geometry import Transform, network_size
from cache.progress import with_progress
from cache.reader import FeatureCache
from cache.storage.stores import open_store
from configs.command import device_name
from configs.schema import CacheSettings, CodecName, Settings
from configs.splits import all_caches, train_split
from extract.decoding import frame_decoder
from extract.detector.frozen import FrameDetector
from extract.detector_masks import predict_queries
from extract.distortion import DistortionMeter, JudgedFrame
from extract.frames import FrameFile

SEED = 0
"""Not the run's seed: runs of several seeds share a cache."""
LOGIT_STEPS = (1 / 32, 1 / 64, 1 / 90, 1 / 128, 1 / 180, 1 / 256, 1 / 512)


@dataclass(frozen=True, kw_only=True)
class ChosenCodec:
    """The codec of a config's caches, the measurements behind it (None where none were made), and why it."""

    codec: Codec
    calibration: Calibration | None
    reason: str

    def location_bytes(self, channels: int) -> float:
        """Stored bytes a position of a map of so many channels: as measured, or else without compression."""
        table = self.calibration
        measured = 0.0 if table is None else table.rows[table.chosen].bytes_per_location
        return measured or self.codec.stored_channels(channels) * self.codec.dtype.itemsize / self.codec.block**2


@dataclass(frozen=True, kw_only=True)
class CalibrationFrames:
    """Frames (a video, and an index into it) that codecs are fitted to, and those that they are judged on."""

    fitted: list[tuple[Video, int]]
    held_out: list[tuple[Video, int]]

    def in_words(self) -> str:
        """How many frames of how many videos each side has."""
        fitted, judged = ({video.id for video, _ in side} for side in (self.fitted, self.held_out))
        if self.fitted == self.held_out:
            return "warning: codecs are judged on the frame that they are fitted to: there is no other"
        others = f"frames of {len(judged)} others" if fitted.isdisjoint(judged) else "later frames of the same"
        text = f"codecs are fitted to {len(self.fitted)} frames of {len(fitted)} videos"
        return f"{text}, and judged on {len(self.held_out)} {others}"


@dataclass(frozen=True, kw_only=True)
class SampleFrame:
    """A frame of the sample as the detector gives it: queries (L, Q, C), cropped map (C, H, W)."""

    frame_queries_LQC: NDArray[np.float32]
    map_CHW: NDArray[np.float32]
    image_hw: Size


def choose_codec(settings: Settings, detector: FrameDetector) -> ChosenCodec:
    """The codec that the config's caches have already (see `held_codec`), else one fitted to its train split."""
    wanted = settings.cache.codec
    held = held_codec(settings)
    if held is not None:
        return held
    if wanted is CodecName.float16:
        return ChosenCodec(codec=Float16(), calibration=None, reason="codec: float16, as cache.codec says")
    codec, calibration = calibrate(settings, detector)
    print(format_table(calibration))
    reason = choice_in_words(calibration, wanted is CodecName.auto)
    return ChosenCodec(codec=codec, calibration=calibration, reason=reason)


def held_codec(settings: Settings) -> ChosenCodec | None:
    """The codec of a cache that the config has already begun, or that `cache.codec_from` names; None without either.

    So all splits share one fit, and a continued cache keeps its own. Raises FingerprintMismatch where that
    is another codec than the settings ask for.
    """
    paths = [paths.features for paths in all_caches(settings)]
    paths = [path for path in paths if open_store(path).attributes("") is not None][:1]
    paths += [] if settings.cache.codec_from is None else [Path(settings.cache.codec_from)]
    if not paths:
        return None
    caches = [FeatureCache.open(path) for path in paths]
    first, last = caches[0], caches[-1]
    codec, wanted = first.root.codec_name, settings.cache.codec
    if wanted not in (CodecName.auto, CodecName(codec)):
        raise FingerprintMismatch(
            "the cache was begun with another codec",
            where=paths[0],
            expected=wanted.value,
            got=codec,
            hint=f"set cache.codec={codec}, or extract into another cache.path",
        )
    if first.fingerprint.codec != last.fingerprint.codec:
        raise FingerprintMismatch(
            f"the cache was begun with another codec than that of cache.codec_from={paths[-1]}",
            where=paths[0],
            expected=last.fingerprint.codec,
            got=first.fingerprint.codec,
            hint="extract into another cache.path",
        )
    reason = f"codec: {codec}, with which {shown(paths[0])} was begun"
    return ChosenCodec(codec=first.codec, calibration=read_calibration(paths[0]), reason=reason)


def calibrate(settings: Settings, detector: FrameDetector) -> tuple[Codec, Calibration]:
    """Fit the codecs to two thirds of the calibration frames and measure them on the others, of other videos.

    Raises AnnotationError where there are no videos, FrameError for unreadable frames (where errors are to be skipped:
    if there is no other).
    """
    split, heads = train_split(settings), detector.prediction_heads()
    sample = draw_frames(split.read_labels().videos, settings.cache.calibration_frames)
    print(sample.in_words())
    accumulator = StatisticsAccumulator(heads.feature_dim)
    fitted_frames = 0
    for frame in _run(settings, detector, split.frames, sample.fitted, "fit codecs"):
        accumulator.add(frame.map_CHW[None], predict_queries(heads, frame.frame_queries_LQC).embeddings_QF)
        fitted_frames += 1
    _require_some(fitted_frames, "fitted to", split.frames)
    statistics = accumulator.statistics()
    meters = _candidates(settings.cache, statistics)
    for frame in _run(settings, detector, split.frames, sample.held_out, "judge codecs"):
        judged = JudgedFrame.of(heads, frame.frame_queries_LQC, frame.map_CHW, frame.image_hw)
        for meter in meters:
            meter.add(judged)
    _require_some(meters[0].num_frames, "judged on", split.frames)
    if not meters[0].num_masks:
        print("warning: the detector sees nothing in the frames that codecs are judged on (cache.calibration_frames)")
    results = [(meter.codec, meter.result()) for meter in meters]
    results.sort(key=lambda result: result[1].bytes_per_frame)
    chosen = _chosen(settings.cache, results)
    calibration = Calibration(
        rows=tuple(row for _, row in results),
        chosen=chosen,
        min_mask_iou=settings.cache.min_mask_iou,
        fitted_frames=fitted_frames,
        held_out_frames=meters[0].num_frames,
    )
    return results[chosen][0], calibration


def _require_some(num_frames: int, what: str, folder: Path) -> None:
    if not num_frames:
        hint = "mend them, take more (cache.calibration_frames), or set cache.codec=float16"
        raise FrameError(f"none of the frames that codecs are to be {what} can be read", where=folder, hint=hint)


def draw_frames(videos: Sequence[Video], num_frames: int) -> CalibrationFrames:
    """Draw frames to judge codecs on, a third, and of other videos those to fit them to; no frame twice.

    Each side takes a frame of each of its videos in random order, then of all of them again. Of a single video the last
    third is judged, of a single frame that frame. Raises AnnotationError where there are no videos.
    """
    if not videos:
        raise AnnotationError("the label file has no videos to draw calibration frames from")
    rng = np.random.default_rng(SEED)
    shuffled = [videos[index] for index in rng.permutation(len(videos))[:num_frames].tolist()]
    undrawn = [list(range(video.length)) for video in shuffled]
    if len(shuffled) == 1:
        length = shuffled[0].length
        cut = length - max(1, length // 3)
        shuffled, undrawn = shuffled * 2, [list(range(cut, length)), list(range(max(1, cut)))]
    drawn, num_held_out = CalibrationFrames(fitted=[], held_out=[]), -(-num_frames // 3)
    for _ in range(min(num_frames, max(map(len, undrawn)))):
        for index, (video, left) in enumerate(zip(shuffled, undrawn, strict=True)):
            side, wanted = (drawn.fitted, num_frames - num_held_out) if index % 3 else (drawn.held_out, num_held_out)
            if left and len(side) < wanted:
                side.append((video, left.pop(int(rng.integers(len(left))))))
    return drawn


def _run(
    settings: Settings, detector: FrameDetector, folder: Path, frames: Sequence[tuple[Video, int]], title: str
) -> Iterator[SampleFrame]:
    decode = frame_decoder(settings.detector.decoder, device_name(settings.device))
    for video, index in with_progress(frames, title, unit="frame"):
        original_hw = (video.height, video.width)
        image_hw = network_size(original_hw, settings.detector.short_edge)
        path, transform = folder / video.file_names[index], Transform.resize(original_hw, image_hw)
        try:
            image_CHW = decode(FrameFile(group="", path=path, original_hw=original_hw, transform=transform))
        except FrameError:
            if settings.extract.skip_errors:
                continue
            raise
        features = detector.features(image_CHW[None])
        map_CHW = crop_map(features.mask_features_BCHW[0].float().cpu().numpy(), image_hw)
        yield SampleFrame(
            frame_queries_LQC=features.frame_queries_BLQC[0].float().cpu().numpy(),
            map_CHW=np.ascontiguousarray(map_CHW, np.float32),
            image_hw=image_hw,
        )


def _candidates(chosen: CacheSettings, statistics: Statistics) -> list[DistortionMeter]:
    meters = [DistortionMeter(codec, "", statistics.mean_C) for codec in (Float16(), Int8.fit(statistics))]
    for step in sorted({*LOGIT_STEPS, chosen.logit_step}):
        for kind in (Logit, Spectral):
            codec = kind.fit(statistics, relative_step=step, identity_share=chosen.identity_share)
            meters.append(DistortionMeter(codec, f"1/{1 / step:g}", statistics.mean_C))
    return meters


def _chosen(settings: CacheSettings, results: Sequence[tuple[Codec, Distortion]]) -> int:
    if settings.codec is CodecName.auto:
        return smallest_faithful([row for _, row in results], settings.min_mask_iou)
    for index, (codec, _) in enumerate(results):
        step = codec.relative_step if isinstance(codec, Logit | Spectral) else settings.logit_step
        if codec.name == settings.codec.value and step == settings.logit_step:
            return index
    raise AssertionError(f"no codec {settings.codec.value} among the candidates")
