"""Every setting with its type, default and meaning; a YAML in this folder states only what differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum


class Device(Enum):
    """Where to compute; auto takes CUDA where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Arithmetic of the forward pass; auto is bfloat16 autocast on CUDA and float32 on CPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DetectorEngine(Enum):
    """What runs the detector: stock `transformers`, or detectron2 with the user's config file and code base."""

    transformers = "transformers"
    detectron2 = "detectron2"


class Decoder(Enum):
    """What decodes and resizes the frames of a data set."""

    pillow = "pillow"  # detectron2's exact pixels
    torchvision = "torchvision"  # JPEGs on the detector's device: nvJPEG on CUDA


class HeadKind(StrEnum):
    """Which head; a new one adds its member here (train_head/heads/contract.py)."""

    vita = "vita"
    gru = "gru"  # train_head/heads/example_head.py: a recurrence over frames


class CodecName(Enum):
    """How mask features are stored; auto is the smallest whose masks stay true (`cache.min_mask_iou`)."""

    float16 = "float16"
    int8 = "int8"
    logit = "logit"
    spectral = "spectral"
    auto = "auto"


class CheckpointChoice(Enum):
    """Which of a run's checkpoints to evaluate; best needs train.evaluate_every."""

    last = "last"
    best = "best"


class PaddedArea(Enum):
    """What the padding of the network's input is to the mask losses."""

    ignore = "ignore"  # no point lies on it
    background = "background"  # VITA: as the release, but only as far as the cache stores padding (less than a stride)


class FrameMatching(Enum):
    """How a frozen detector's predictions are matched to a frame's objects for the similarity loss."""

    category_map = "category_map"  # class costs where a category exists in both worlds, masks elsewhere
    mask_only = "mask_only"
    release = "release"  # VITA: the detector has the data set's own classes, or else a random frozen class layer


class Split(Enum):
    """Which videos to evaluate; auto is the labelled validation set, or else the hold-out."""

    auto = "auto"
    train = "train"
    valid = "valid"
    holdout = "holdout"


@dataclass
class ViewSettings:
    """A variant of every train video: cut out, resized, mirrored, in this order."""

    crop: float = 1.0  # share of height and of width that is kept
    crop_seed: int = 0  # decides, with the video's id, where the crop lies
    short_edge: int | None = None  # pixels; null takes detector.short_edge
    flip: bool = False  # left to right


@dataclass
class DataSettings:
    """A data set in YouTube-VIS layout; label and frame paths are relative to `root`."""

    root: str = "datasets/demo"  # a folder
    train_labels: str = "train.json"  # YTVIS JSON
    train_frames: str = "train/JPEGImages"  # the folder that the labels' file_names are below
    valid_labels: str | None = "valid.json"  # null: no validation set
    valid_frames: str | None = "valid/JPEGImages"
    holdout: float = 0.0  # share of the train videos kept out of training to evaluate on
    holdout_seed: int = 0  # decides, with the names of their folders, which
    views: list[ViewSettings] = field(default_factory=list)  # of train videos, beside themselves: clips show any one


@dataclass
class PseudoSettings:
    """Pseudo-videos: crops of a labelled still image play the frames of a video, as in SeqFormer and VITA.

    An image is thought of at one of `resize_edges`, where its crops have sides within `crop_sides`.
    """

    ratio: float = 0.0  # clips of pseudo-videos for each clip of a video; 0: they are not even extracted
    labels: str | None = None  # COCO instances JSON; as `images`, relative to data.root
    images: str | None = None
    num_images: int | None = None  # drawn from those that show known categories; null takes all
    num_frames: int = 6  # crops of an image in the cache; fine-tuning draws them anew for every clip
    seed: int = 0  # of choice and crops
    resize_edges: list[int] = field(default_factory=lambda: [400, 500, 600])  # shorter edge, pixels
    crop_sides: list[int] = field(default_factory=lambda: [384, 600])  # least and largest, pixels
    short_edges: list[int] = field(default_factory=lambda: list(range(288, 513, 32)))  # of the network input
    rotation: float = 15.0  # degrees to either side
    flip: bool = True  # half of them, left to right


BATCH_FRAMES = 8
"""That go through the detector at once where `detector.batch_frames` does not say, on a CPU at most."""


@dataclass
class DetectorSettings:
    """The frozen Mask2Former of stage one."""

    weights: str = "extract/demo/detector"  # Hugging Face folder, or official .pkl / .pth
    architecture: str | None = None  # r50, r101, swin-l; null reads it from the weights
    engine: DetectorEngine = DetectorEngine.transformers
    config_file: str | None = None  # of engine=detectron2: the YAML of the Mask2Former or VITA code base
    num_layers: int = 3  # cached decoder layers, the last ones: training uses all, inference the last
    short_edge: int | None = 360  # pixels; null keeps the native size
    decoder: Decoder = Decoder.pillow  # of frames
    batch_frames: int | None = None  # at once; null: 8, on CPU fewer of large ones; halved where memory is short
    precision: Precision = Precision.auto  # of its forward pass


@dataclass
class CacheSettings:
    """Where the features lie: one cache per split, `<path>/train` and `<path>/valid`."""

    path: str = "caches/demo"  # a folder, or the address of one in an object store, such as s3://bucket/demo
    codec: CodecName = CodecName.spectral  # its AP against float16: docs/measured.md
    min_mask_iou: float = 0.99  # of codec=auto: mean IoU of the detector's masks from stored and from exact features
    logit_step: float = 1 / 128  # of codec=spectral and logit: share of the logits' standard deviation; auto chooses it
    identity_share: float = 0.1  # λ of these two: how much they care for what the detector does not look at
    codec_from: str | None = None  # a cache, as caches/coco/train, whose fit is taken: so train.mix can mix them
    calibration_frames: int = 96  # two thirds that codecs are fitted to, a third, of other videos, to judge them on
    preload: bool = False  # every data worker keeps the videos it has read in memory: for sets that fit so often
    stage_to: str | None = None  # a local folder: training copies to it, extraction to an address writes there first
    ignore_space: bool = False  # extract even if the features do not seem to fit on the disk


@dataclass
class ExtractSettings:
    """How stage one runs; nothing here changes a feature, but for `threads`, in its last bits."""

    workers: int | None = None  # processes, one a GPU; null: one, or all GPUs of ray_address; more than one needs Ray
    ray_address: str | None = None  # of a Ray cluster, such as auto; its machines share all paths
    threads: int | None = None  # of each process on CPU; null takes PyTorch's choice
    skip_errors: bool = False  # leave out videos that cannot be read; <cache>/skipped.json names them
    allow_skipped: bool = False  # end with status 0 even so


@dataclass
class HeadSettings:
    """The head and its sizes, of which it takes those it needs; VITA's release has 6 + 3 layers, the paper 3 + 6."""

    kind: HeadKind = HeadKind.vita
    hidden_dim: int = 256  # channels of its tokens
    mask_dim: int = 256  # channels of a mask embedding
    num_queries: int = 100  # video queries, each of which may find an object
    num_heads: int = 8  # attention heads, which share hidden_dim evenly
    ffn_dim: int = 2048  # channels within a feed-forward block
    enc_layers: int = 6  # among frame queries
    dec_layers: int = 3  # from frame queries to video queries
    window: int = 6  # frames per encoder window; 0 attends to all
    shift_in_training: bool = False  # VITA: the release shifts windows in inference only
    shift_short_videos: bool = True  # VITA: the release shifts, and so splits, also videos that fit one window


@dataclass
class LossSettings:
    """Weights of the loss terms and number of sampled points; the first three weigh the matching's costs as well."""

    class_weight: float = 2.0  # of the cross-entropy of categories
    mask_weight: float = 5.0  # of the binary cross-entropy of masks
    dice_weight: float = 5.0  # of the dice loss of masks
    sim_weight: float = 0.5  # of the similarity of frame and video queries; 0: the head has no embeddings for it
    frame_weight: float = 1.0  # of the detector's own losses on single frames, where it is fine-tuned
    no_object_weight: float = 0.1  # of queries without an object among the categories' cross-entropy; objects have 1
    num_points: int = 12544  # that the mask losses see of every mask
    matching_points: int | None = None  # that the matching sees of every frame; null takes num_points
    oversample: float = 3.0  # candidates per point of the losses, of which the uncertain ones are kept
    frame_matching: FrameMatching = FrameMatching.category_map
    padded_area: PaddedArea = PaddedArea.ignore  # VITA: the release has background; cached maps have little of it
    absent_frames: bool = True  # VITA: the release's mask cross-entropy counts frames without the object too


@dataclass
class MixSettings:
    """Another cache of labelled videos to train on, by the same detector and with the same codec and categories."""

    cache: str  # path of one split, such as caches/coco/train
    ratio: float = 1.0  # its clips for each clip of the config's own train videos


@dataclass
class TrainSettings:
    """The training run."""

    iterations: int = 130_000  # steps of the optimiser
    batch_clips: int = 8  # of all processes together
    accumulate: int = 1  # micro-batches that a process cuts its share into, to save memory
    num_frames: int = 5  # per clip
    num_layers: int | None = None  # cached detector layers to train on, the last ones; null takes all
    frame_range: int = 20  # clip frames lie within this many frames of the reference frame
    replacement: bool = True  # VITA: the release draws a clip's frames with replacement
    mix: list[MixSettings] = field(default_factory=list)  # beside the train videos (and pseudo-videos: pseudo.ratio)
    learning_rate: float = 5e-5  # of AdamW, at its highest
    weight_decay: float = 0.05  # of all but norms, embeddings and positional biases
    warmup: int = 10  # steps in which the learning rate rises, evenly
    decay_steps: list[int] = field(default_factory=lambda: [75_000])  # at each the rate is multiplied by decay_factor
    decay_factor: float = 0.1
    clip_norm: float = 0.01  # largest norm of all gradients together
    ema: float = 0.0  # decay of a moving average of the weights, which is then evaluated; 0 keeps none
    time_budget: float = 0.0  # seconds after which a run stops, with a checkpoint; 0 is no limit
    precision: Precision = Precision.auto  # of the head; its losses are float32
    compile: bool = False  # torch.compile the head, not its losses: minutes at the start; its gain is not measured
    workers: int | None = None  # that read clips ahead; null: 2, on CUDA up to 4 a GPU; 0: the trainer reads
    log_every: int = 20  # steps between lines of metrics.jsonl
    checkpoint_every: int = 1000  # steps
    evaluate_every: int = 0  # steps between evaluations while training, which keep the best checkpoint; 0 is never


@dataclass
class FinetuneSettings:
    """Training the detector too (`make finetune`), from images: what differs from training the head alone."""

    frames_only: bool = False  # the detector without a head, on single frames: train.batch_clips of them
    detector_rate: float = 1.0  # share of train.learning_rate that the detector takes
    backbone_rate: float = 0.1  # and that its backbone takes
    flip: bool = True  # half of the clips, left to right; every frame of a clip alike, as all that follows
    short_edges: list[int] = field(
        default_factory=lambda: list(range(288, 513, 32))
    )  # pixels, one for each clip; [] is detector.short_edge
    crop_share: float = 0.5  # of the clips are cut out before they are resized
    resize_edges: list[int] = field(default_factory=lambda: [400, 500, 600])  # shorter edge that crop_sides refer to
    crop_sides: list[int] = field(default_factory=lambda: [384, 600])  # least and largest edge of a crop


@dataclass
class EvaluateSettings:
    """Whole-video inference and scoring."""

    split: Split = Split.auto
    checkpoint: CheckpointChoice = CheckpointChoice.last
    top_k: int = 10  # tracks per video: 10 for YouTube-VIS, 20 for OVIS
    repeats: bool = True  # VITA: the release may give one video query several labels
    keep_queries: float = 1.0  # share of each frame's queries that the head sees: those least likely "no object"
    chunk_frames: int = 16  # frames that are read, encoded and decoded at once; any number gives the same tracks
    report_videos: int = 6  # shown in report.html


@dataclass
class Settings:
    """One experiment."""

    name: str = "demo"  # of the run, whose folder is <runs>/<name>
    seed: int = 0  # of weights, clips and points
    device: Device = Device.auto
    runs: str = "runs"  # a folder
    data: DataSettings = field(default_factory=DataSettings)
    pseudo: PseudoSettings = field(default_factory=PseudoSettings)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    extract: ExtractSettings = field(default_factory=ExtractSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
