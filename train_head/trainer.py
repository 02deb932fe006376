"""Stage two: train a head from a cache, a head and the detector from images, or the detector alone.

Whatever varies from step to step depends on (seed, clip number) alone, so that a resumed run equals one that was
never interrupted, bit for bit on CPU, and any number of processes sees the same batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor, nn

from cache.allocation import keep_freed_memory
from cache.errors import ConfigError
from cache.progress import StageProgress, is_main, say
from configs.command import device_name, precision_name
from configs.schema import Settings
from train_head.batch_errors import explained_errors
from train_head.build import TrainedPart, build_optimizer, head_config, learning_rate, trained_parameters
from train_head.checkpoint import BEST, CHECKPOINT, Checkpoint, Progress, load_checkpoint, save_checkpoint
from train_head.data.clip_loader import load_clips, num_workers
from train_head.data.sources import AnyClip, CachedSource, FeatureSource
from train_head.data.upload import place_batches
from train_head.data.video_sets import open_labelled_set, open_training_set
from train_head.distributed import Group, join_group, share_of_batches
from train_head.heads.kinds import build_head
from train_head.pace import Pace
from train_head.products import has_bfloat16
from train_head.run_folder import MetricsLog, open_run, sole_trainer
from train_head.step import StepLosses, TrainingStep
from train_head.stopping import StopRequest, start_worker_server

_log = logging.getLogger(__name__)

Evaluator = Callable[[], float | None]
"""AP of the run's checkpoint on its evaluation split, a fraction; None where the split has no public labels."""


def train(settings: Settings, evaluator: Evaluator | None = None) -> Path:
    """Train a head from the cache to its last iteration, going on from its checkpoint if there is one.

    `evaluator` is called every `train.evaluate_every` steps. Returns the run's folder. Raises VitaCacheError where
    cache, labels and settings do not belong together, another process trains this run, a loss is not finite, or memory
    does not suffice.
    """
    if evaluator is not None and settings.train.evaluate_every and is_main():
        open_labelled_set(settings, "train.evaluate_every")  # now rather than hours into the run
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
    folder = Path(settings.runs) / settings.name
    with sole_trainer(folder) if group.is_main else nullcontext():
        if group.is_main:
            open_run(settings, source.holdout)
        group.wait()
        Trainer(settings, source, folder, group, torch_device, evaluator).run()
        group.leave()
    return folder


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
        self.clips = source.clips()
        self.group = group or Group()
        self.device = device or torch.device(device_name(settings.device))
        if self.device.type == "cpu":
            keep_freed_memory()
        autocast = precision_name(settings.train.precision, self.device.type) == "bfloat16"
        if autocast and not has_bfloat16(self.device):
            print("warning: this processor emulates bfloat16, some 20 times slower than train.precision=float32")
        self.compute = TrainingStep(settings, source, self.device, self.group, autocast)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            self.head = build_head(head_config(settings, source.sizes)).to(self.device).train()
        if settings.train.compile:
            self.head.compile()
        self.average: dict[str, Tensor] = {}
        self.parts = [*([TrainedPart(module=self.head)] if source.trains_head else []), *source.parts]
        self.optimizer = build_optimizer(self.parts, settings)
        self.progress = Progress()
        if (folder / CHECKPOINT).exists():
            self._resume(load_checkpoint(folder / CHECKPOINT))
        if not self.group.agrees(self.progress.step, self.device):
            raise ConfigError(
                f"this process goes on from step {self.progress.step}, others from another",
                where=folder,
                hint="`runs` must lie on a file system that all processes share",
            )
        if settings.train.ema > 0 and not self.average:
            self.average = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}

    def _resume(self, checkpoint: Checkpoint) -> None:
        where = self.folder / CHECKPOINT
        self.source.resume(checkpoint, where)
        checkpoint.require_categories(self._category_names, where)
        checkpoint.require_config(self.head.config, where)
        if self.source.trains_head:
            self.head.load_state_dict(dict(checkpoint.head))
        if checkpoint.optimizer:  # an imported release has none
            self.optimizer.load_state_dict(dict(checkpoint.optimizer))
        self.average = {name: tensor.to(self.device) for name, tensor in checkpoint.average.items()}
        best = self.folder / BEST
        self.progress = Progress(
            step=checkpoint.step,
            seconds=checkpoint.seconds,
            best_ap=load_checkpoint(best).best_ap if best.exists() else -1.0,  # it may be newer than the checkpoint
            evaluated=checkpoint.evaluated,
        )

    def run(self) -> None:
        """Train to the last iteration, or to the end of `train.time_budget`.

        Raises KeyboardInterrupt where it was asked to stop (Ctrl-C, SIGTERM), after the step and with a checkpoint.
        """
        train, done = self.settings.train, self.progress
        if done.step >= train.iterations and not self._is_evaluation_due:
            if self.group.is_main:
                print(f"train: {self.folder} has its {train.iterations} iterations already")
            return
        if self.group.is_main:
            _log.info(self._in_words())
        log = MetricsLog(self.folder, done.step, done.evaluated) if self.group.is_main else None
        with StopRequest() as stop:  # to the last checkpoint: a sweep or torchrun passes on what all have got
            self._take_steps(stop, log)
            if log is not None:
                log.close()
            stopped = done.step < train.iterations and self._any(stop.requested)
            if self.group.is_main and not stopped:
                if done.step < train.iterations:
                    print(f"train: the time budget of {train.time_budget:g} s is spent at step {done.step}")
                print(self.source.finish(self.folder), end="")
            self.save()  # of the last step only now: a run that is killed in `finish` has to come here again
        if stopped:
            raise KeyboardInterrupt

    def _take_steps(self, stop: StopRequest, log: MetricsLog | None) -> None:
        """Train until the last iteration, a request to stop, or the end of the time budget."""
        train, done, pace = self.settings.train, self.progress, Pace(self.progress.seconds)
        if train.workers != 0:
            start_worker_server()
        batches = self._batches()
        bar = StageProgress("train", unit="step", total=train.iterations, done=done.step, shown=self.group.is_main)
        with bar:
            if self._is_evaluation_due:  # the run was killed between a checkpoint and its evaluation
                self._evaluate(log)
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
                if self._is_evaluation_due:
                    self._evaluate(log)
                elif done.step % train.checkpoint_every == 0 and done.step < train.iterations:
                    self.save()

    def _in_words(self) -> str:
        """What runs where, from which step on."""
        train, count = self.settings.train, sum(parameter.numel() for parameter in trained_parameters(self.parts))
        return (
            f"train: {self.folder}, steps {self.progress.step} to {train.iterations}; {count:,} parameters on "
            f"{self.device} in {'bfloat16' if self.compute.autocast else 'float32'}; {self.group.size} processes with "
            f"{num_workers(train.workers, self.device)} workers each"
        )

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
        clips = load_clips(self.clips, numbers, workers=train.workers, held=own, device=self.device)
        return place_batches((list(islice(clips, own)) for _ in steps), self.source.place, self.device)

    def training_step(self, clips: Sequence[AnyClip]) -> StepLosses:
        """Gradients and update for one batch.

        Raises VitaCacheError, naming the videos, if anything is not finite; nothing is updated then. Raises ConfigError
        where the batch does not fit into memory.
        """
        with explained_errors(self.settings.train, self.progress.step, clips, self.folder):
            return self._update(clips)

    def _update(self, clips: Sequence[AnyClip]) -> StepLosses:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate() * group["rate_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.compute.gradients(self.head, clips)
        parameters = trained_parameters(self.parts)
        self.group.sum_gradients(parameters)
        losses = StepLosses.read(terms, nn.utils.clip_grad_norm_(parameters, self.settings.train.clip_norm))
        self.optimizer.step()
        if self.average:
            state = self.head.state_dict()
            tensors = [state[name] for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), tensors, 1 - self.settings.train.ema)
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

    @property
    def _is_evaluation_due(self) -> bool:
        every = self.settings.train.evaluate_every
        return every > 0 and self.progress.step % every == 0 and self.progress.step > self.progress.evaluated

    def _evaluate(self, log: MetricsLog | None) -> None:
        """Save, log the AP of the current head and keep the best checkpoint; the main process does it for all."""
        self.save()
        if log is not None and self.evaluator is not None and (ap := self.evaluator()) is not None:
            log.write(self.progress.step, {"AP": ap})
            if ap > self.progress.best_ap:
                self.progress.best_ap = ap
                self.save(BEST)
        self.progress.evaluated = self.progress.step
        self.save()
        self.group.wait()

    @property
    def _category_names(self) -> tuple[str, ...]:
        return tuple(category.name for category in self.source.labels.categories)

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
            category_names=self._category_names,
        )
        save_checkpoint(self.folder / name, checkpoint)
