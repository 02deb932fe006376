"""What a clip's labels say: its objects, where they are present, their masks (VITA §3.3).

Shapes: N objects of the clip, T frames, L detector layers, h×w input pixels without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.errors import AnnotationError


@dataclass(frozen=True, kw_only=True)
class ClipTargets:
    """The objects that have at least one pixel in a clip. N = 0 is an empty clip.

    All but the masks stays on the host: the losses pad it there and send it in one copy, with what they match.
    """

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

    def placed(self, copy: Callable[[Tensor], Tensor]) -> ClipTargets:
        """The labels of a clip, with its masks copied to the computing device; nothing is left in shared memory."""
        return ClipTargets(
            labels_N=self.labels_N.clone(),
            identities_N=self.identities_N.clone(),
            present_NT=self.present_NT.clone(),
            masks_NThw=copy(self.masks_NThw),
        )

    def objects_by_frame(self) -> tuple[Tensor, ...]:
        """T of int64 (M): the objects present in each frame, ascending."""
        objects = self.present_NT.t().nonzero()[:, 1]
        return torch.split(objects, self.present_NT.sum(dim=0).tolist())


def clip_targets(labels_N: Tensor, identities_N: Tensor, masks_NThw: Tensor) -> ClipTargets:
    """Targets from a clip's instance masks (N, T, h, w), all zero where an object is absent; copied only if one goes.

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
        masks_NThw=masks_NThw if len(kept) == len(masks_NThw) else masks_NThw.index_select(0, kept),
    )
