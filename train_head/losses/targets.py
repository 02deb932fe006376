"""What a clip's labels say: its objects, where they are present, their masks (REFERENCE §4).

Shapes: N objects of the clip, T frames, L detector layers, h×w input pixels without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cache.errors import AnnotationError


@dataclass(frozen=True, kw_only=True)
class ClipTargets:
    """The objects that have at least one pixel in a clip. N = 0 is an empty clip."""

    labels_N: Tensor  # int64, 0 … K - 1
    identities_N: Tensor  # int64, one number per object of the video
    present_NT: Tensor  # bool, whether the object has a pixel in the frame
    masks_NThw: Tensor  # uint8 or bool, at input size, unpadded; sampled at points, never made dense floats
    frame_queries_LTN: Tensor | None = None  # int64, the detector query matched there, -1 = none

    def __post_init__(self) -> None:
        """Check that the shapes belong together."""
        N, T = self.present_NT.shape
        if self.masks_NThw.shape[:2] != (N, T) or len(self.labels_N) != N or len(self.identities_N) != N:
            raise AnnotationError(
                "labels, identities and masks of a clip do not belong together",
                expected=f"{N} objects in {T} frames",
                got=f"{len(self.labels_N)} labels, {len(self.identities_N)} identities, "
                f"masks of shape {tuple(self.masks_NThw.shape)}",
            )
        matches = self.frame_queries_LTN
        if matches is not None and matches.shape[1:] != (T, N):
            raise AnnotationError("frame matches of another clip", expected=f"(L, {T}, {N})", got=tuple(matches.shape))

    @property
    def num_objects(self) -> int:
        """N."""
        return len(self.labels_N)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Input size without padding, in pixels."""
        return self.masks_NThw.shape[2], self.masks_NThw.shape[3]

    def to(self, device: torch.device) -> ClipTargets:
        """Copy to a device."""
        matches = self.frame_queries_LTN
        return ClipTargets(
            labels_N=self.labels_N.to(device),
            identities_N=self.identities_N.to(device),
            present_NT=self.present_NT.to(device),
            masks_NThw=self.masks_NThw.to(device),
            frame_queries_LTN=None if matches is None else matches.to(device),
        )


def clip_targets(labels_N: Tensor, identities_N: Tensor, masks_NThw: Tensor) -> ClipTargets:
    """Targets from a clip's instance masks (N, T, h, w), all zero where an object is absent.

    Objects without a pixel in the whole clip are dropped, as in the release.
    VITA: the release shifts identities so that the smallest is 0; here they are only ever compared within one
    clip and stay as the label file has them.
    """
    present_NT = masks_NThw.flatten(2).any(dim=2).bool()
    kept = present_NT.any(dim=1).nonzero().flatten()
    # index_select copies whole masks; indexing by booleans copies pixel by pixel.
    return ClipTargets(
        labels_N=labels_N[kept].long(),
        identities_N=identities_N[kept].long(),
        present_NT=present_NT[kept],
        masks_NThw=masks_NThw.index_select(0, kept),
    )
