"""Train the demo's detector, a small but real Mask2Former, on still images only.

It plays the COCO-pretrained detector of the paper: `make demo-detector` retrains it (about 40 minutes on 2 cores),
resuming from its last checkpoint, and writes a Hugging Face folder (float16 safetensors) that `extract` reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from cache.progress import StageProgress
from extract.demo.pretrain import DensePretraining
from extract.demo.shapes import DETECTOR_CATEGORIES
from extract.demo.stills import make_still
from extract.demo.videos import FRAME_SIZES
from extract.detector.architectures import ALL_STAGES
from extract.detector.frozen import PADDING_DIVISOR, normalise_and_pad
from extract.detector.loading import quiet_transformers

DEMO_DETECTOR = Path(__file__).parent / "detector"
NUM_HELD_OUT = 64
_STILLS_PER_SEED = 1_000_000
_HELD_OUT_OFFSET = 900_000_000

Batch = dict[str, Any]


def build_model() -> Mask2FormerForUniversalSegmentation:
    """Build the demo's Mask2Former: 2.3 M parameters, ResNet of basic blocks, 4 decoder layers, 20 queries."""
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 192],
        depths=[1, 1, 2, 2],
        layer_type="basic",
        **ALL_STAGES,
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=2,
        encoder_feedforward_dim=256,
        dim_feedforward=256,
        decoder_layers=5,
        num_attention_heads=8,
        num_queries=20,
        train_num_points=1024,
        class_weight=4.0,  # twice COCO's: from random weights, classes are what comes last
        id2label=dict(enumerate(DETECTOR_CATEGORIES)),
        label2id={name: index for index, name in enumerate(DETECTOR_CATEGORIES)},
    )
    return Mask2FormerForUniversalSegmentation(config)


class StillBatches(Dataset[Batch]):
    """Batch number i of the endless stream of stills; sizes alternate so that no batch is padded twice."""

    def __init__(self, num_batches: int, batch_size: int, first_seed: int = 0) -> None:
        self.num_batches, self.batch_size, self.first_seed = num_batches, batch_size, first_seed

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        size = FRAME_SIZES[index % len(FRAME_SIZES)]
        seeds = range(self.first_seed + index * self.batch_size, self.first_seed + (index + 1) * self.batch_size)
        stills = [make_still(seed, size) for seed in seeds]
        padding = (0, -size[1] % PADDING_DIVISOR, 0, -size[0] % PADDING_DIVISOR)
        pixels = torch.from_numpy(np.stack([s.image for s in stills])).permute(0, 3, 1, 2).float()
        return {
            "pixel_values": normalise_and_pad(pixels),
            "mask_labels": [functional.pad(torch.from_numpy(s.masks).float(), padding) for s in stills],
            "class_labels": [torch.from_numpy(s.classes) for s in stills],
        }


def train(output: Path, pretraining: int, iterations: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Train and write the detector folder; the checkpoint beside it is removed when training is done."""
    torch.manual_seed(seed)
    model = build_model().train()
    dense = DensePretraining(model.model.pixel_level_module, model.config.mask_feature_size, len(DETECTOR_CATEGORIES))
    output.mkdir(parents=True, exist_ok=True)

    def dense_loss(batch: Batch) -> Tensor:
        loss: Tensor = dense(batch["pixel_values"], batch["mask_labels"], batch["class_labels"])
        return loss

    def set_loss(batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    first = _Phase(name="pretrain", iterations=pretraining, batch_size=batch_size, learning_rates=(2 * learning_rate,))
    rates = (learning_rate, 0.3 * learning_rate)  # features that are good already move less
    second = _Phase(name="train", iterations=iterations, batch_size=batch_size, learning_rates=rates)
    checkpoints = [output / f"{phase.name}.pt" for phase in (first, second)]
    _run_phase(first, dense, model, dense_loss, checkpoints[0], seed)
    _run_phase(second, model, model, set_loss, checkpoints[1], seed + 1)
    with quiet_transformers():
        model.half().save_pretrained(output, safe_serialization=True)
    for checkpoint in checkpoints:
        checkpoint.unlink()


@dataclass(frozen=True, kw_only=True)
class _Phase:
    name: str
    iterations: int
    batch_size: int
    learning_rates: tuple[float, ...]  # of the whole model; or of the rest, and of the pixel-level module


def _run_phase(
    phase: _Phase,
    trained: nn.Module,
    model: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    checkpoint: Path,
    seed: int,
) -> None:
    """Train one phase to its end, from its checkpoint if there is one."""
    groups: list[list[nn.Parameter]] = [[] for _ in phase.learning_rates]
    for name, parameter in trained.named_parameters():
        groups["pixel_level" in name and len(groups) > 1].append(parameter)
    rates = list(phase.learning_rates)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], rates[0], weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=phase.iterations + 1, pct_start=0.05, div_factor=20
    )
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
    first_still = seed * _STILLS_PER_SEED + step * phase.batch_size
    stream = StillBatches(phase.iterations - step, phase.batch_size, first_still)
    loader = DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8)
    with StageProgress(phase.name, unit="step", total=phase.iterations, done=step) as progress:
        for batch in loader:
            torch.manual_seed(seed + step)  # Mask2Former's loss draws its points from the global generator
            loss = loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            progress.show(loss=f"{loss.item():.2f}")
            progress.advance()
            if step % 500 == 0 or step == phase.iterations:
                _save_checkpoint(checkpoint, trained, optimizer, schedule, step)
                print(
                    json.dumps({"phase": phase.name, "step": step, "loss": loss.item(), **held_out_quality(model)}),
                    flush=True,
                )
                trained.train()


def _save_checkpoint(path: Path, model: nn.Module, optimizer: Any, schedule: Any, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "step": step,
    }
    torch.save(state, temporary)
    temporary.replace(path)


@torch.no_grad()
def held_out_quality(model: nn.Module) -> dict[str, float]:
    """Measure on stills that training never sees.

    Returns, over objects: mean IoU of the best query, recall at IoU 0.5, accuracy of that query's class.
    """
    model.eval()
    ious: list[float] = []
    correct: list[bool] = []
    held_out = StillBatches(NUM_HELD_OUT // 16, 16, _HELD_OUT_OFFSET)
    for batch in (held_out[index] for index in range(len(held_out))):
        output = model(pixel_values=batch["pixel_values"])
        size = batch["pixel_values"].shape[-2:]
        predicted = functional.interpolate(output.masks_queries_logits, size, mode="bilinear") > 0
        classes = output.class_queries_logits[..., :-1].argmax(-1)
        for masks, truth, labels, row in zip(
            predicted, batch["mask_labels"], batch["class_labels"], classes, strict=True
        ):
            overlap = torch.einsum("qhw,nhw->nq", masks.float(), truth)
            union = masks.sum((1, 2))[None] + truth.sum((1, 2))[:, None] - overlap
            best, query = (overlap / union.clamp(min=1)).max(1)
            ious += best.tolist()
            correct += (row[query] == labels).tolist()
    return {
        "iou": float(np.mean(ious)),
        "recall50": float(np.mean(np.array(ious) > 0.5)),
        "accuracy": float(np.mean(correct)),
    }


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m extract.demo.train_detector", description=__doc__)
    parser.add_argument("--output", type=Path, default=DEMO_DETECTOR)
    parser.add_argument("--pretraining", type=int, default=5000)
    parser.add_argument("--iterations", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
