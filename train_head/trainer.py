"""Stage two: train the VITA head from a cache.

Whatever varies from step to step depends on (seed, step) alone, so that a resumed run equals one that was
never interrupted, bit for bit on CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cache.errors import ConfigError, VitaCacheError
from configs.command import device_name, precision_name
from configs.schema import Settings
from train_head.build import (
    build_criterion,
    build_optimizer,
    decoding_of,
    head_config,
    learning_rate,
    map_channels,
)
from train_head.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint
from train_head.clips import Clip, ClipConfig, ClipDataset
from train_head.criterion import LossNormalisers, VitaLosses
from train_head.data import VideoSet, open_training_set
from train_head.detector_predictions import FrozenHeads
from train_head.frame_memory import build_frame_memory
from train_head.head import VitaHead
from train_head.points import PointConfig, RandomPoints
from train_head.run_folder import MetricsLog, open_run
from train_head.targets import ClipTargets


def train(settings: Settings) -> Path:
    """Train a run to its last iteration, going on from its checkpoint if there is one; returns its folder.

    Raises VitaCacheError where cache, labels and settings do not belong together, or a loss is not finite.
    """
    if precision_name(settings.train.precision, device_name(settings.device)) == "float16":
        raise ConfigError("training in float16 is not offered", hint="use train.precision=bfloat16 or float32")
    videos = open_training_set(settings)
    trainer = Trainer(settings, videos, open_run(settings, videos.holdout))
    trainer.run()
    return trainer.folder


class Trainer:
    """Head, optimiser and data of one run."""

    def __init__(self, settings: Settings, videos: VideoSet, folder: Path) -> None:
        self.settings, self.videos, self.folder = settings, videos, folder
        self.device = torch.device(device_name(settings.device))
        self.autocast = precision_name(settings.train.precision, self.device.type) == "bfloat16"
        heads = videos.feature_cache.heads
        self.decoding = decoding_of(videos.codec, map_channels(heads)).to(self.device)
        self.detector_heads = FrozenHeads(heads).to(self.device)
        self.frame_memory = build_frame_memory(settings, videos, self.detector_heads, self.decoding)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.head = VitaHead(head_config(settings, videos)).to(self.device).train()
        self.optimizer = build_optimizer(self.head, settings)
        self.criterion = build_criterion(settings.loss)
        self.points = PointConfig(matching=settings.loss.num_points, loss=settings.loss.num_points)
        self.step, self.seconds = 0, 0.0
        if (folder / CHECKPOINT).exists():
            self._resume(load_checkpoint(folder / CHECKPOINT, self.device))

    def _resume(self, checkpoint: Checkpoint) -> None:
        checkpoint.require_cache(self.videos.feature_cache, self.folder / CHECKPOINT)
        checkpoint.require_config(self.head.config, self.folder / CHECKPOINT)
        self.head.load_state_dict(dict(checkpoint.head))
        if checkpoint.optimizer:  # an imported release has none
            self.optimizer.load_state_dict(dict(checkpoint.optimizer))
        self.step, self.seconds = checkpoint.step, checkpoint.seconds

    def run(self) -> None:
        """Train to the last iteration, with a checkpoint every `checkpoint_every` steps and at the end."""
        train, first_step = self.settings.train, self.step
        if first_step >= train.iterations:
            print(f"train: {self.folder} has its {train.iterations} iterations already")
            return
        log = MetricsLog(self.folder, first_step)
        started, waited = time.perf_counter(), 0.0
        batches = self._batches()
        with tqdm(total=train.iterations, initial=first_step, desc="train", unit="step") as progress:
            while self.step < train.iterations:
                asked = time.perf_counter()
                clips = next(batches)
                waited += time.perf_counter() - asked
                losses = self.training_step(clips)
                progress.update()
                elapsed = time.perf_counter() - started
                if self.step % train.log_every == 0 or self.step == train.iterations:
                    values = _logged(losses, learning_rate(self.settings, self.step - 1))
                    log.write(self.step, {**values, "seconds": self.seconds + elapsed, "data_share": waited / elapsed})
                    progress.set_postfix(loss=f"{values['loss']:.2f}", waiting=f"{waited / elapsed:.0%}")
                if self.step % train.checkpoint_every == 0 or self.step == train.iterations:
                    self.save(self.seconds + elapsed)

    def _batches(self) -> Iterator[list[Clip]]:
        train = self.settings.train
        config = ClipConfig(
            num_frames=train.num_frames,
            frame_range=train.frame_range,
            seed=self.settings.seed,
            replacement=train.replacement,
        )
        dataset = ClipDataset(self.videos.feature_cache, self.videos.labels, self.videos.video_ids, config)
        loader: DataLoader[Clip] = DataLoader(
            dataset,
            batch_size=train.batch_clips,
            sampler=range(self.step * train.batch_clips, train.iterations * train.batch_clips),
            num_workers=train.workers,
            collate_fn=list,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="forkserver" if train.workers else None,
        )
        return iter(loader)

    def training_step(self, clips: Sequence[Clip]) -> VitaLosses:
        """Forward, losses, backward and update for one batch; raises VitaCacheError if anything is not finite."""
        maps = [clip.map_TRHW.to(self.device, non_blocking=True) for clip in clips]
        queries = torch.stack([clip.frame_queries_TLQC for clip in clips]).to(self.device, non_blocking=True)
        queries_LBTQC = self.detector_heads.normed(queries).permute(2, 0, 1, 3, 4)
        targets = [self.frame_memory.with_matches(clip, clip.targets.to(self.device)) for clip in clips]
        try:
            losses = self._losses(queries_LBTQC, maps, targets)
        except FloatingPointError as error:
            raise self._not_finite(clips, str(error)) from error
        if not math.isfinite(losses.total.item()):
            raise self._not_finite(clips, "the loss is not finite")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.head.parameters(), self.settings.train.clip_norm)
        self.optimizer.step()
        self.step += 1
        return losses

    def _losses(self, queries_LBTQC: Tensor, maps: list[Tensor], targets: list[ClipTargets]) -> VitaLosses:
        settings = self.settings
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            outputs = self.head(queries_LBTQC, shift=settings.head.shift_in_training)
            mask_weights = self.head.fold_masks(outputs.mask_embed_DLBVC, self.decoding)
        normalisers = LossNormalisers.of_batch(
            targets, len(queries_LBTQC), settings.head.num_queries, settings.loss.no_object_weight
        )
        points = RandomPoints.for_step(self.points, settings.seed, self.step, self.device)
        return self.criterion(outputs, mask_weights, maps, targets, points, normalisers)

    def _not_finite(self, clips: Sequence[Clip], reason: str) -> VitaCacheError:
        names = [f"{self.videos.labels.video_by_id[clip.video_id].name} frames {clip.frames}" for clip in clips]
        return VitaCacheError(
            f"step {self.step}: {reason}; the batch was {'; '.join(names)}",
            where=self.folder,
            hint="lower train.learning_rate, or train.precision=float32; the last checkpoint is untouched",
        )

    def save(self, seconds: float) -> None:
        """Write the checkpoint of the current step."""
        checkpoint = Checkpoint(
            step=self.step,
            seconds=seconds,
            config=self.head.config,
            head=self.head.state_dict(),
            optimizer=self.optimizer.state_dict(),
            fingerprint=self.videos.feature_cache.fingerprint,
            category_names=tuple(category.name for category in self.videos.labels.categories),
        )
        save_checkpoint(self.folder / CHECKPOINT, checkpoint)


def _logged(losses: VitaLosses, rate: float) -> dict[str, float]:
    """What metrics.jsonl holds of a step: the total, the final layer's terms, the learning rate."""
    return {
        "loss": losses.total.item(),
        "class": losses.class_D[-1].item(),
        "mask": losses.mask_D[-1].item(),
        "dice": losses.dice_D[-1].item(),
        "similarity": losses.similarity.item(),
        "learning_rate": rate,
    }
