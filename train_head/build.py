"""Settings and a cache become the parts of a run: head sizes, codec matrices, losses, optimiser, learning rate."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from cache.codecs import Codec
from cache.errors import IncompleteVideo
from cache.heads import DetectorHeads
from cache.labels.tracks import Labels
from cache.layout import video_group_name
from cache.reader import FeatureCache
from configs.schema import LossSettings, Settings
from train_head.heads.contract import HeadConfig
from train_head.heads.map_planes import MapPlanes
from train_head.heads.mask_folding import MapDecoding
from train_head.losses.criterion import LossWeights, VitaCriterion
from train_head.losses.matcher import CostWeights
from train_head.losses.points import PointConfig


@dataclass(frozen=True, kw_only=True)
class FeatureSizes:
    """Sizes that detector and labels dictate to the head."""

    num_classes: int  # of the labels
    num_queries: int  # frame queries
    hidden_dim: int  # channels of a frame query
    map_channels: int  # of the FPN map, before any codec


def feature_sizes(feature_cache: FeatureCache, labels: Labels) -> FeatureSizes:
    """Read the sizes off a cache and its labels; raises IncompleteVideo where the first video is not there."""
    if not labels.videos:
        raise IncompleteVideo("the labels name no video", where=feature_cache.path)
    first = feature_cache.video(video_group_name(labels.videos[0].id))
    return FeatureSizes(
        num_classes=len(labels.categories),
        num_queries=first.queries.shape[2],
        hidden_dim=feature_cache.heads.hidden_dim,
        map_channels=map_channels(feature_cache.heads),
    )


def head_config(settings: Settings, sizes: FeatureSizes) -> HeadConfig:
    """Sizes of the head: what the settings choose, under the same names, and what detector and labels dictate."""
    return HeadConfig(
        **asdict(settings.head),
        num_classes=sizes.num_classes,
        num_frame_queries=sizes.num_queries,
        detector_dim=sizes.hidden_dim,
        map_dim=sizes.map_channels,
        use_sim=settings.loss.sim_weight > 0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """A module that is trained, and its share of the learning rate."""

    module: nn.Module
    rate_factor: float = 1.0


def map_channels(heads: DetectorHeads) -> int:
    """C of the detector's FPN map."""
    return int(heads.arrays["mask_features.weight"].shape[1])


def decoding_of(codec: Codec, num_channels: int) -> MapDecoding:
    """Read a codec's matrix and mean off what it makes of the unit embeddings; the identity stays implicit."""
    identity = np.eye(num_channels, dtype=np.float32)
    weights, constant = codec.fold(identity)
    if constant is None and np.array_equal(weights, identity):
        return MapDecoding()
    return MapDecoding(
        planes=None if codec.planes is None else MapPlanes.on(torch.device("cpu"), codec.planes),
        matrix_CR=torch.from_numpy(np.asarray(weights, dtype=np.float32)),
        mean_C=None if constant is None else torch.from_numpy(np.asarray(constant, dtype=np.float32)),
    )


def build_criterion(
    chosen: LossSettings, device: torch.device, matching_type: torch.dtype = torch.float32
) -> VitaCriterion:
    """Losses with the settings' weights, in the form that suits the device.

    The matching uses the same three weights, as in the release.
    """
    return VitaCriterion(
        weights=LossWeights(
            label=chosen.class_weight,
            mask=chosen.mask_weight,
            dice=chosen.dice_weight,
            similarity=chosen.sim_weight,
            no_object=chosen.no_object_weight,
        ),
        cost_weights=cost_weights(chosen),
        padded_area=chosen.padded_area,
        matching_type=matching_type,
        absent_frames=chosen.absent_frames,
        batched=device.type == "cuda",
    )


def cost_weights(chosen: LossSettings) -> CostWeights:
    """What a match costs, for tracks as for single frames."""
    return CostWeights(label=chosen.class_weight, mask=chosen.mask_weight, dice=chosen.dice_weight)


def point_config(chosen: LossSettings) -> PointConfig:
    """How many points the matching and the losses see."""
    matching = chosen.num_points if chosen.matching_points is None else chosen.matching_points
    return PointConfig(matching=matching, loss=chosen.num_points, oversample=chosen.oversample)


def trained_parameters(parts: Sequence[TrainedPart]) -> list[nn.Parameter]:
    """Return the parameters of all parts that take gradients."""
    return [parameter for part in parts for parameter in part.module.parameters() if parameter.requires_grad]


NOT_DECAYED = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)
# Swin's, named as in `transformers`; the official code calls the second one absolute_pos_embed.
NOT_DECAYED_NAMES = ("relative_position_bias_table", "position_embeddings")


def build_optimizer(parts: Sequence[TrainedPart], settings: Settings) -> torch.optim.AdamW:
    """AdamW; norms, embeddings and positional biases are not decayed, as in the release. Two groups for each part.

    A group's `rate_factor` says which share of the learning rate it takes.
    """
    groups = []
    for part in parts:
        free: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for module in part.module.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    excepted = isinstance(module, NOT_DECAYED) or name in NOT_DECAYED_NAMES
                    (free if excepted else decayed).append(parameter)
        for parameters, decay in ((decayed, settings.train.weight_decay), (free, 0.0)):
            groups.append({"params": parameters, "weight_decay": decay, "rate_factor": part.rate_factor})
    return torch.optim.AdamW(groups, lr=settings.train.learning_rate, fused=True)


def learning_rate(settings: Settings, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then times `decay_factor` at every one of `decay_steps`."""
    train = settings.train
    warm = min(1.0, (step + 1) / max(1, train.warmup))
    return float(train.learning_rate * warm * train.decay_factor ** bisect.bisect_right(train.decay_steps, step))
