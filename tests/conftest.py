"""Fixtures that many tests share: a tiny generated data set, its cache by the demo's real detector, a trained run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from configs.load import load_settings
from configs.schema import Settings
from extract.demo.videos import write_split
from extract.stage import extract
from train_head.trainer import train

# `make test` started this process: a command that is stopped here would name that as the one that goes on.
os.environ.pop("MAKE_TYPED", None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and lose much where other processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five train and two validation videos of six frames, in YouTube-VIS layout."""
    root = tmp_path_factory.mktemp("tiny_data")
    write_split(root, "train", 5, num_frames=6)
    write_split(root, "valid", 2, num_frames=6)
    return root


def tiny_settings(data: Path, features: Path | str, runs: Path, *overrides: str) -> Settings:
    """The demo's settings on tiny data with a tiny head: a training step takes some 30 ms."""
    tiny = [
        f"data.root={data}",
        f"cache.path={features}",
        f"runs={runs}",
        "head.enc_layers=2",
        "head.dec_layers=2",
        "head.ffn_dim=64",
        "loss.num_points=64",
        "train.iterations=6",
        "train.batch_clips=2",
        "train.num_frames=3",
        "train.warmup=2",
        "train.decay_steps=[4]",
        "train.log_every=1",
        "train.checkpoint_every=3",
        "device=cpu",
        "cache.codec=float16",  # nothing to fit: faster
    ]
    return load_settings("demo", [*tiny, *overrides])


@pytest.fixture(scope="session")
def tiny_cache(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both splits of the tiny data, extracted."""
    features = tmp_path_factory.mktemp("tiny_cache")
    extract(tiny_settings(tiny_data, features, features / "runs"))
    return features


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a run that is trained to its end."""
    settings = tiny_settings(tiny_data, tiny_cache, tmp_path_factory.mktemp("tiny_runs"), "name=tiny")
    train(settings)
    return settings
