"""What goes wrong within a step, told with the batch that it happened to and with what to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache.errors import ConfigError, VitaCacheError, is_out_of_memory
from configs.schema import TrainSettings
from train_head.data.sources import SampledClip


@contextmanager
def explained_errors(train: TrainSettings, step: int, clips: Sequence[SampledClip], where: Path) -> Iterator[None]:
    """Turn numbers that are not finite into a VitaCacheError that names the videos, lack of memory into ConfigError."""
    try:
        yield
    except FloatingPointError as error:
        names = "; ".join(f"{clip.name} frames {clip.frames}" for clip in clips)
        raise VitaCacheError(
            f"step {step}: {error}; the batch was {names}",
            where=where,
            hint="lower train.learning_rate, or train.precision=float32; the last checkpoint is untouched",
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"step {step}: out of memory with {len(clips)} clips of {len(clips[0].frames)} frames a process, of which "
            f"{len(clips) // train.accumulate} at a time",
            where=where,
            hint=f"train.accumulate={len(clips)} takes one clip at a time, to the same end; or lower train.batch_clips "
            "or train.num_frames; the last checkpoint is untouched",
        ) from error
