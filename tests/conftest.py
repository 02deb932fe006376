"""Fixtures that many tests share: a tiny generated data set, its cache by the demo's real detector, a trained run.

PyTorch is imported where it is used: before pytest-xdist starts its processes, it imports this file in its own.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from configs.load import load_settings
from configs.schema import Settings

# `make test` started this process: a command that is stopped here would name that as the one that goes on.
os.environ.pop("MAKE_TYPED", None)
# A shell that started this in the background has it ignore Ctrl-C, and so would what is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = {"test_readme", "test_processes", "test_workers", "test_torture", "test_stopping", "test_sweep"}
"""Files of few tests that take long: first, so that no process begins one when the others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files; the order of tests within one stays."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and lose much where other processes share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five train and two validation videos of six frames, in YouTube-VIS layout."""
    from extract.demo.videos import write_split

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
    from extract.stage import extract

    features = tmp_path_factory.mktemp("tiny_cache")
    extract(tiny_settings(tiny_data, features, features / "runs"))
    return features


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a run that is trained to its end."""
    from train_head.trainer import train

    settings = tiny_settings(tiny_data, tiny_cache, tmp_path_factory.mktemp("tiny_runs"), "name=tiny")
    train(settings)
    return settings
