"""Which head a config names."""

from __future__ import annotations

from collections.abc import Mapping

from configs.schema import HeadKind
from train_head.heads.contract import HeadConfig, TrackHead
from train_head.heads.example_head import GruHead
from train_head.heads.vita import VitaHead

HEADS: Mapping[HeadKind, type[TrackHead]] = {HeadKind.vita: VitaHead, HeadKind.gru: GruHead}


def build_head(config: HeadConfig) -> TrackHead:
    """A new head of the config's kind and sizes, initialised from PyTorch's global generator."""
    return HEADS[config.kind](config)
