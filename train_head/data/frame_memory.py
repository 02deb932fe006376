"""Frame-level matches of a run: computed when a frame is first seen, then remembered, since nothing can change them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cache.errors import CorruptData
from cache.heads import DetectorHeads
from cache.labels.category_map import category_pairs
from configs.schema import FrameMatching, Settings
from train_head.build import cost_weights
from train_head.data.clips import Clip
from train_head.data.video_sets import VideoSet
from train_head.heads.mask_folding import MapDecoding
from train_head.losses.detector_predictions import FrozenHeads
from train_head.losses.frame_matches import frame_points, label_map, match_frames
from train_head.losses.matcher import CostWeights
from train_head.losses.targets import ClipTargets


class FrameMatchMemory:
    """Adds to a clip's targets which detector query is which object in each frame.

    Shapes: T frames, L detector layers, N objects of the clip, A tracks of the video.
    """

    def __init__(
        self,
        heads: FrozenHeads,
        decoding: MapDecoding,
        label_map_KJ: Tensor,
        num_points: int,
        cost_weights: CostWeights,
    ) -> None:
        self.heads, self.decoding, self.label_map_KJ = heads, decoding, label_map_KJ
        self.num_points, self.cost_weights = num_points, cost_weights
        self._known: dict[tuple[str, int], Tensor] = {}  # (clip's key, frame) -> (L, A), -1 where not matched

    def with_matches(self, clip: Clip) -> ClipTargets:
        """Return the targets of a clip with the matches of its layers, always the same ones."""
        targets = clip.targets
        unknown = [f for f in dict.fromkeys(clip.frames) if (clip.key, f) not in self._known]
        if unknown:
            self._compute(clip, unknown)
        matches_TLA = torch.stack([self._known[clip.key, frame] for frame in clip.frames])
        matches_LTN = matches_TLA.transpose(0, 1)[..., targets.identities_N]
        return replace(targets, frame_queries_LTN=matches_LTN)

    def _compute(self, clip: Clip, frames: list[int]) -> None:
        targets, device = clip.targets, clip.map_TRHW.device
        rows = torch.tensor([clip.frames.index(frame) for frame in frames])
        present_NT = targets.present_NT.index_select(1, rows)
        rows = rows.to(device)
        # index_select copies whole frames; indexing by a tensor takes twice as long.
        chosen = replace(
            targets,
            present_NT=present_NT,
            masks_NThw=targets.masks_NThw.index_select(1, rows),
        )
        queries_TLQC, map_TRHW = (x.index_select(0, rows) for x in (clip.frame_queries_TLQC, clip.map_TRHW))
        _require_finite(clip, frames, queries_TLQC, map_TRHW)
        matches_LTN = match_frames(
            self.heads.predict(self.heads.normed(queries_TLQC), self.decoding),
            self.decoding.expand(map_TRHW, clip.map_hw),
            chosen,
            self.label_map_KJ,
            frame_points(clip.name, frames, self.num_points).to(device),
            self.cost_weights,
            batched=device.type == "cuda",
        )
        for column, frame in enumerate(frames):
            matches_LA = matches_LTN.new_full((len(matches_LTN), clip.num_tracks), -1)
            matches_LA[:, targets.identities_N] = matches_LTN[:, column]
            self._known[clip.key, frame] = matches_LA


def _require_finite(clip: Clip, frames: list[int], *features: Tensor) -> None:
    """Raise CorruptData where features, (T, ...) each, are not numbers: a loss that is none would not say why."""
    finite_T = torch.stack([_is_finite(tensor) for tensor in features]).all(dim=0).tolist()
    if not all(finite_T):
        hint = f"`python -m cache verify {clip.cache}` finds all that is damaged; extract those videos again"
        what = f"the features of {clip.name}, frame {frames[finite_T.index(False)]}, are not finite"
        raise CorruptData(what, where=clip.cache, hint=hint)


def _is_finite(stored: Tensor) -> Tensor:
    """Whether all numbers of each frame are finite; of float16 by their bits, six times as fast on CPU."""
    frames = stored.flatten(1)
    if frames.dtype != torch.float16:
        return frames.isfinite().all(dim=1)
    return (frames.view(torch.int16) & 0x7FFF).amax(dim=1) < 0x7C00  # without its sign, from infinity on


def build_frame_memory(
    settings: Settings, videos: VideoSet, heads: FrozenHeads, decoding: MapDecoding
) -> FrameMatchMemory:
    """Build the memory that `loss.frame_matching` asks for."""
    device = heads.decoder_norm.weight.device
    stored, labels, loss = videos.feature_cache.heads, videos.labels, settings.loss
    num_labels = len(labels.categories)
    if loss.frame_matching is FrameMatching.release and stored.num_classes != num_labels:
        print("loss.frame_matching=release: the detector has other classes; its class layer is drawn anew and frozen")
        stored = redrawn_classes(stored, num_labels, settings.seed)
        heads = FrozenHeads(stored).to(device)
    pairs = category_pairs(labels.categories, stored.category_names)
    return FrameMatchMemory(
        heads,
        decoding,
        label_map(loss.frame_matching, num_labels, stored.num_classes, pairs).to(device),
        loss.num_points,
        cost_weights(loss),
    )


def redrawn_classes(stored: DetectorHeads, num_classes: int, seed: int) -> DetectorHeads:
    """Give a detector a random class layer for other classes.

    VITA: its release does so, and freezes the layer, for a frozen detector whose classes are not the data set's; the
    class costs of the frame-level matching are then noise.
    """
    rng = np.random.default_rng([seed, num_classes])
    bound = stored.hidden_dim**-0.5
    drawn = {
        "class_embed.weight": rng.uniform(-bound, bound, (num_classes + 1, stored.hidden_dim)).astype(np.float32),
        "class_embed.bias": rng.uniform(-bound, bound, num_classes + 1).astype(np.float32),
    }
    return DetectorHeads(arrays={**stored.arrays, **drawn}, category_names=())
