"""Stage two: train the VITA head, from a cache or together with the detector.

Whatever varies from step to step depends on (seed, clip number) alone, so that a resumed run equals one that was
never interrupted, bit for bit on CPU, and any number of processes sees the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor, nn

from cache.errors import ConfigError, VitaCacheError
from cache.progress import StageProgress, say
from configs.command import device_name, precision_name
from configs.schema import Settings
from train_head.allocation import keep_freed_memory
from train_head.build import TrainedPart, build_optimizer, head_config, learning_rate, trained_parameters
from train_head.checkpoint import BEST, CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint
from train_head.data.clip_loader import load_clips
from train_head.data.sources import AnyClip, CachedSource, FeatureSource
from train_head.data.video_sets import open_training_set
from train_head.distributed import Group, join_group
from train_head.heads.kinds import build_head
from train_head.pace import Pace
from train_head.run_folder import MetricsLog, open_run
from train_head.step import StepLosses, TrainingStep
from train_head.stopping import StopRequest

Evaluator = Callable[[], float | None]
"""AP of the run's checkpoint on its evaluation split, a fraction; None where the split has no public labels."""


def train(settings: Settings, evaluator: Evaluator | None = None) -> Path:
    """Train a head from the cache to its last iteration, going on from its checkpoint if there is one.

    `evaluator` is called every `train.evaluate_every` steps. Returns the run's folder. Raises VitaCacheError where
    cache, labels and settings do not belong together, or a loss is not finite.
    """
    return run_training(settings, lambda device: CachedSource(settings, open_training_set(settings), device), evaluator)


def run_training(
    settings: Settings,
    open_source: Callable[[torch.device], FeatureSource[AnyClip]],
    evaluator: Evaluator | None = None,
) -> Path:
    """Train on the clips and features of any source; the rest as `train`."""
    device = device_name(settings.device)
    if precision_name(settings.train.precision, device) == "float16":
        raise ConfigError("training in float16 is not offered", hint="use train.precision=bfloat16 or float32")
    group, torch_device = join_group(device)
    share = group.size * settings.train.accumulate
    if settings.train.batch_clips % share:
        raise ConfigError(
            "train.batch_clips cannot be shared evenly",
            expected=f"a multiple of {group.size} processes x train.accumulate {settings.train.accumulate}",
            got=settings.train.batch_clips,
        )
    source = open_source(torch_device)
    folder = open_run(settings, source.holdout) if group.is_main else Path(settings.runs) / settings.name
    group.wait()
    Trainer(settings, source, folder, group, torch_device, evaluator).run()
    group.wait()
    return folder


@dataclass(kw_only=True)
class Progress:
    """How far a run is: what a checkpoint stores beside weights."""

    step: int = 0
    seconds: float = 0.0
    best_ap: float = -1.0


class Trainer(Generic[AnyClip]):
    """Head, optimiser and data of one run."""

    def __init__(
        self,
        settings: Settings,
        source: FeatureSource[AnyClip],
        folder: Path,
        group: Group | None = None,
        device: torch.device | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.settings, self.source, self.folder, self.evaluator = settings, source, folder, evaluator
        self.group = group or Group()
        self.device = device or torch.device(device_name(settings.device))
        if self.device.type == "cpu":
            keep_freed_memory()
        autocast = precision_name(settings.train.precision, self.device.type) == "bfloat16"
        self.compute = TrainingStep(settings, source, self.device, self.group, autocast)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.head = build_head(head_config(settings, source.sizes)).to(self.device).train()
        if settings.train.compile:
            self.head.compile()
        self.average: dict[str, Tensor] = {}
        self.parts = [*([TrainedPart(module=self.head)] if source.trains_head else []), *source.parts]
        self.optimizer = build_optimizer(self.parts, settings)
        self.progress = Progress()
        if (folder / CHECKPOINT).exists():
            self._resume(load_checkpoint(folder / CHECKPOINT, self.device))
        if settings.train.ema > 0 and not self.average:
            self.average = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.source.resume(checkpoint, self.folder / CHECKPOINT)
        checkpoint.require_config(self.head.config, self.folder / CHECKPOINT)
        if self.source.trains_head:
            self.head.load_state_dict(dict(checkpoint.head))
        if checkpoint.optimizer:  # an imported release has none
            self.optimizer.load_state_dict(dict(checkpoint.optimizer))
        self.average = dict(checkpoint.average)
        self.progress = Progress(step=checkpoint.step, seconds=checkpoint.seconds, best_ap=checkpoint.best_ap)

    def run(self) -> None:
        """Train to the last iteration, or to the end of `train.time_budget`.

        Raises KeyboardInterrupt where it was asked to stop (Ctrl-C, SIGTERM), after the step and with a checkpoint.
        """
        train, done = self.settings.train, self.progress
        if done.step >= train.iterations:
            print(f"train: {self.folder} has its {train.iterations} iterations already")
            return
        log = MetricsLog(self.folder, done.step) if self.group.is_main else None
        pace = Pace(done.seconds)
        batches = self._batches()
        bar = StageProgress("train", unit="step", total=train.iterations, done=done.step, shown=self.group.is_main)
        with StopRequest() as stop, bar:
            while done.step < train.iterations and not self._any(stop.requested or pace.spent(train.time_budget)):
                losses = pace.step(batches, self.training_step)
                done.seconds = pace.seconds
                bar.advance()
                if self.group.is_main and (complaint := pace.complaint()) is not None:
                    say(complaint)
                if log is not None and (done.step % train.log_every == 0 or done.step == train.iterations):
                    times = pace.times()
                    log.write(done.step, {**self._logged(losses), **times, "learning_rate": self._rate(-1)})
                    shown = {name: f"{1e3 * times[name]:.0f} ms" for name in ("data_time", "step_time")}
                    bar.show(loss=f"{losses.loss:.2f}", **shown)
                if train.evaluate_every and done.step % train.evaluate_every == 0:
                    self._evaluate(log)
                elif done.step % train.checkpoint_every == 0 and done.step < train.iterations:
                    self.save()
        if log is not None:
            log.close()
        if done.step < train.iterations and self._any(stop.requested):
            self.save()
            raise KeyboardInterrupt
        if self.group.is_main:
            if done.step < train.iterations:
                print(f"train: the time budget of {train.time_budget:.0f} s is spent at step {done.step}")
            print(self.source.finish(self.folder), end="")
        self.save()  # of the last step only now: a run that is killed in `finish` has to come here again

    def _any(self, flag: bool) -> bool:
        """Whether any process says so: all must stop at the same step, or they would wait for ever."""
        if self.group.size == 1:
            return flag
        return float(self.group.sum(torch.tensor(float(flag), device=self.device))) > 0

    def _batches(self) -> Iterator[list[AnyClip]]:
        train = self.settings.train
        own = train.batch_clips // self.group.size
        steps = range(self.progress.step, train.iterations)
        numbers = share_of_batches(steps, train.batch_clips, self.group)
        clips = load_clips(self.source.clips(), numbers, workers=train.workers, held=own, device=self.device)
        for _ in steps:
            yield list(islice(clips, own))

    def training_step(self, clips: Sequence[AnyClip]) -> StepLosses:
        """Gradients and update for one batch; raises VitaCacheError, naming the videos, if anything is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate() * group["rate_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        try:
            losses = self.compute.gradients(self.head, clips)
        except FloatingPointError as error:
            raise self._not_finite(clips, str(error)) from error
        parameters = trained_parameters(self.parts)
        self.group.sum_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, self.settings.train.clip_norm)
        self.optimizer.step()
        for name, tensor in self.head.state_dict().items() if self.average else ():
            self.average[name].lerp_(tensor, 1 - self.settings.train.ema)
        self.progress.step += 1
        return losses

    def _logged(self, losses: StepLosses) -> dict[str, float]:
        """What metrics.jsonl holds of a step's losses."""
        values = asdict(losses)
        values["class"] = values.pop("class_loss")
        if not self.source.parts:
            del values["frames"]
        return values

    def _rate(self, offset: int = 0) -> float:
        return learning_rate(self.settings, self.progress.step + offset)

    def _not_finite(self, clips: Sequence[AnyClip], reason: str) -> VitaCacheError:
        names = [f"{clip.name} frames {clip.frames}" for clip in clips]
        return VitaCacheError(
            f"step {self.progress.step}: {reason}; the batch was {'; '.join(names)}",
            where=self.folder,
            hint="lower train.learning_rate, or train.precision=float32; the last checkpoint is untouched",
        )

    def _evaluate(self, log: MetricsLog | None) -> None:
        """Save, log the AP of the current head and keep the best checkpoint; the main process does it for all."""
        self.save()
        if log is not None and self.evaluator is not None and (ap := self.evaluator()) is not None:
            log.write(self.progress.step, {"AP": ap})
            if ap > self.progress.best_ap:
                self.progress.best_ap = ap
                self.save(BEST)
                self.save()
        self.group.wait()

    def save(self, name: str = CHECKPOINT) -> None:
        """Write a checkpoint of the current step."""
        if not self.group.is_main:
            return
        checkpoint = Checkpoint(
            **asdict(self.progress),
            config=self.head.config,
            head=self.head.state_dict() if self.source.trains_head else {},
            average=self.average,
            optimizer=self.optimizer.state_dict(),
            detector=self.source.state(),
            fingerprint=self.source.fingerprint,
            category_names=tuple(category.name for category in self.source.labels.categories),
        )
        save_checkpoint(self.folder / name, checkpoint)


def share_of_batches(steps: range, batch_clips: int, group: Group) -> Iterator[int]:
    """This process's clip numbers: its part of the batch of each step."""
    own = batch_clips // group.size
    for step in steps:
        first = step * batch_clips + group.rank * own
        yield from range(first, first + own)
