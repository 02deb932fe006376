"""What a head is to the trainer, the losses, the checkpoint and the inference: tokens and mask features in, tracks out.

A head gets the frame queries of the detector (after its `decoder_norm`) and says, for each of V tracks, which category
it is and where: one mask embedding, whose dot product with the mask features of every frame is the track's mask logit
there. Mask features are the detector's FPN map after the head's own 1×1 convolution `vita_mask_features`; the map
itself never passes through a head, so that losses and inference can fold convolution and codec into the embeddings.

A new head is three steps: a subclass of `TrackHead` (`example_head.py` has one), a member of `HeadKind` in
`configs/schema.py`, a line in `kinds.py`. `head.kind=` then trains, resumes, evaluates and compares it.

Shapes: B clips, T frames, Q frame queries, V tracks (video queries), C channels, L detector layers, D outputs that the
losses see (decoder layers), K categories.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from cache.errors import ConfigError
from configs.schema import HeadKind
from train_head.heads.frame_spill import TokenBlock
from train_head.heads.mask_folding import MapDecoding, MaskWeights, fold_mask_embeddings


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes of a head, which takes those it needs. VITA's paper has 3 encoder, 6 decoder layers; the release 6, 3."""

    num_classes: int
    kind: HeadKind = HeadKind.vita
    num_frame_queries: int = 100
    num_queries: int = 100
    hidden_dim: int = 256
    num_heads: int = 8
    ffn_dim: int = 2048
    enc_layers: int = 6
    dec_layers: int = 3
    window: int = 6  # frames that see each other in one encoder layer; 0 = all
    mask_dim: int = 256
    detector_dim: int = 256  # channels of the frame queries
    map_dim: int = 256  # channels of the detector's FPN map
    shift_in_training: bool = False  # VITA: the release shifts windows in inference only
    shift_short_videos: bool = True  # VITA: the release also splits videos of at most one window by the shift
    use_sim: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        if self.hidden_dim % self.num_heads:
            raise ConfigError(
                "hidden_dim is not a multiple of num_heads",
                where="head",
                got=f"hidden_dim {self.hidden_dim}, num_heads {self.num_heads}",
                hint="set head.num_heads to a divisor of head.hidden_dim",
            )
        if self.window < 0 or self.dec_layers < 1:
            raise ConfigError(
                "needs window >= 0 (0 = full attention) and at least one decoder layer",
                where="head",
                got=f"window {self.window}, dec_layers {self.dec_layers}",
            )


@dataclass(frozen=True, kw_only=True)
class HeadOutputs:
    """What the head says about B clips, for every detector layer and (where D stands) every decoder layer.

    Every one of the D outputs is matched and penalised; the last is the final one. A head without the similarity loss
    leaves both of its embeddings None.
    """

    class_logits_DLBVK: Tensor  # K + 1 entries, the last is "no object"
    mask_embed_DLBVC: Tensor
    video_queries_DLBVC: Tensor  # after decoder_norm
    clip_similarity_LBVC: Tensor | None  # of the last decoder layer, the only one that the loss uses
    frame_similarity_LBTQC: Tensor | None


@dataclass(frozen=True, kw_only=True)
class VideoOutputs:
    """What the head says about one video: the last decoder layer's class logits and mask embeddings."""

    class_logits_VK: Tensor
    mask_embed_VC: Tensor


class TrackHead(nn.Module, ABC):
    """A head of `config.num_queries` tracks. A checkpoint keeps its config and its `state_dict`."""

    vita_mask_features: nn.Conv2d
    """`mask_feature_layer(config)`: FPN map to mask features."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, frame_queries_LBTQC: Tensor) -> HeadOutputs:
        """Training outputs of B clips; every detector layer is an independent pass. Frames are in temporal order."""

    @abstractmethod
    def predict_stream(self, blocks: Iterable[TokenBlock], num_frames: int) -> VideoOutputs:
        """Outputs for one video of `num_frames`, without gradients; `blocks` yields its frames in order, once.

        Frames may have fewer tokens than query slots (`evaluate.keep_queries`). A head that needs all frames at once
        concatenates the blocks: the tokens of a video are small beside its masks, which are decoded block by block.
        """

    def fold_masks(self, mask_embed: Tensor, decoding: MapDecoding) -> MaskWeights:
        """Weights that turn stored map channels into mask logits, for embeddings (..., mask_dim)."""
        conv = self.vita_mask_features
        assert conv.bias is not None
        return fold_mask_embeddings(mask_embed, conv.weight.flatten(1), conv.bias, decoding)


def mask_feature_layer(config: HeadConfig) -> nn.Conv2d:
    """The convolution from FPN map to mask features, initialised as in the release."""
    layer = nn.Conv2d(config.map_dim, config.mask_dim, kernel_size=1)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
