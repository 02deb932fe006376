"""What a codec does to the detector's own masks, frame by frame.

Shapes: C map channels, H×W the stored map, R stored channels, N judged queries, L layers, Q frame queries.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cache.codecs import Codec
from cache.codecs.rate_distortion import Distortion
from cache.heads import DetectorHeads
from cache.layout import STRIDE, Size
from cache.storage.compression import compress, decompress
from cache.storage.shard_layout import CRC_BYTES
from extract.detector_masks import QueryPredictions, predict_queries

JUDGED_QUERIES = 10
"""Per frame, those most likely to be an object: tracks are made of these."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class JudgedFrame:
    """A frame as the detector gives it, with the masks that a codec should keep."""

    map_CHW: NDArray[np.float32]
    image_hw: Size
    logits_NHW: NDArray[np.float32]
    masks_Nhw: NDArray[np.bool_]
    stored_queries: QueryPredictions
    """Of the judged queries, from float16 as the cache holds them."""
    query_bytes: int

    @classmethod
    def of(
        cls, heads: DetectorHeads, frame_queries_LQC: Floats, map_CHW: NDArray[np.float32], image_hw: Size
    ) -> JudgedFrame:
        """Predict the masks of the queries that matter, from the last layer."""
        exact = predict_queries(heads, frame_queries_LQC[-1])
        best_N = np.argsort(-exact.object_probability_Q, kind="stable")[:JUDGED_QUERIES]
        logits_NHW = _logits(exact.embeddings_QF[best_N], exact.constant_Q[best_N], map_CHW)
        stored_LQC = frame_queries_LQC.astype(np.float16)
        return cls(
            map_CHW=map_CHW,
            image_hw=image_hw,
            logits_NHW=logits_NHW,
            masks_Nhw=_masks(logits_NHW, image_hw),
            stored_queries=predict_queries(heads, stored_LQC[-1, best_N]),
            query_bytes=stored_LQC.nbytes,
        )


class DistortionMeter:
    """Sums up one codec's costs and errors."""

    def __init__(self, codec: Codec, setting: str, mean_C: NDArray[np.float64]) -> None:
        self.codec, self.setting = codec, setting
        self._mean_C11 = mean_C[:, None, None].astype(np.float32)
        self.num_frames = self.num_masks = 0
        self._bytes = self._map_bytes = self._locations = self._channels = 0
        self._encode_s = self._decode_s = 0.0
        self._errors, self._signals = np.zeros(2), np.zeros(2)  # squares, of features and of logits
        self._ious: list[NDArray[np.float64]] = []

    def add(self, frame: JudgedFrame) -> None:
        """Store and read one frame in memory, and compare."""
        map_hw = frame.map_CHW.shape[1:]
        stored_Rhw, channels_KHW = self._store(frame.map_CHW)
        decoded_CHW = self.codec.decode(stored_Rhw[None], map_hw)[0]
        queries = frame.stored_queries
        folded_NR, constant_N = self.codec.fold(queries.embeddings_QF)
        constant_N = queries.constant_Q if constant_N is None else queries.constant_Q + constant_N
        logits_NHW = _logits(folded_NR, constant_N, channels_KHW)
        centred_NHW = frame.logits_NHW - frame.logits_NHW.mean(axis=(1, 2), keepdims=True)
        errors = (decoded_CHW - frame.map_CHW, logits_NHW - frame.logits_NHW)
        signals = (frame.map_CHW - self._mean_C11, centred_NHW)
        self._errors += [float(np.square(values, dtype=np.float64).mean()) for values in errors]
        self._signals += [float(np.square(values, dtype=np.float64).mean()) for values in signals]
        self._ious.append(_ious(frame.masks_Nhw, _masks(logits_NHW, frame.image_hw)))
        self.num_masks += len(self._ious[-1])
        self._bytes += frame.query_bytes + CRC_BYTES
        self._locations += frame.map_CHW[0].size
        self.num_frames += 1
        self._channels = len(stored_Rhw)

    def result(self) -> Distortion:
        """The means so far, of at least one frame; IoUs of queries without any mask do not count.

        Where there is no mask at all the IoU is 0: nothing shows that the codec keeps them.
        """
        ious = np.concatenate(self._ious)
        feature_error, logit_error = np.sqrt(self._errors / np.maximum(self._signals, 1e-30))
        return Distortion(
            codec=self.codec.name,
            setting=self.setting,
            stored_channels=self._channels,
            bytes_per_frame=(self._bytes + self._map_bytes) / self.num_frames,
            bytes_per_location=self._map_bytes / self._locations,
            feature_error=float(feature_error),
            logit_error=float(logit_error),
            mask_iou=float(ious.mean()) if len(ious) else 0.0,
            mask_iou_p5=float(np.percentile(ious, 5)) if len(ious) else 0.0,
            encode_ms=1e3 * self._encode_s / self.num_frames,
            decode_ms=1e3 * self._decode_s / self.num_frames,
        )

    def _store(self, map_CHW: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """What comes back from disk, and its channels at pixels; the time and bytes of it are noted."""
        started = time.perf_counter()
        encoded = self.codec.encode(map_CHW[None])[0]
        content = compress(encoded) if self.codec.compressed else encoded.tobytes()
        self._encode_s += time.perf_counter() - started
        self._map_bytes += len(content) + CRC_BYTES
        started = time.perf_counter()
        stored: NDArray[Any] = np.empty_like(encoded)
        if self.codec.compressed:
            decompress(content, stored.reshape(-1).view(np.uint8).data)
        else:
            stored[...] = np.frombuffer(content, stored.dtype).reshape(stored.shape)
        planes = self.codec.planes
        channels = stored.astype(np.float32) if planes is None else planes.expand(stored[None], map_CHW.shape[1:])[0]
        self._decode_s += time.perf_counter() - started
        return stored, channels


def _logits(embeddings_NR: Floats, constant_N: Floats, map_RHW: NDArray[Any]) -> NDArray[np.float32]:
    logits_NS = embeddings_NR @ map_RHW.reshape(len(map_RHW), -1).astype(np.float32) + constant_N[:, None]
    return np.asarray(logits_NS.reshape(-1, *map_RHW.shape[1:]), np.float32)


def _masks(logits_NHW: NDArray[np.float32], image_hw: Size) -> NDArray[np.bool_]:
    """Up-sampled to the network's input, as at inference."""
    size = (logits_NHW.shape[1] * STRIDE, logits_NHW.shape[2] * STRIDE)
    logits_1Nhw = functional.interpolate(torch.from_numpy(logits_NHW)[None], size=size, mode="bilinear")
    masks: NDArray[np.bool_] = (logits_1Nhw[0, :, : image_hw[0], : image_hw[1]] > 0).numpy()
    return masks


def _ious(exact_Nhw: NDArray[np.bool_], stored_Nhw: NDArray[np.bool_]) -> NDArray[np.float64]:
    union_N = (exact_Nhw | stored_Nhw).sum(axis=(1, 2))
    intersection_N = (exact_Nhw & stored_Nhw).sum(axis=(1, 2))
    return np.asarray(intersection_N[union_N > 0] / union_N[union_N > 0])
