"""What a cache will say of the features that a config and a detector give."""

from __future__ import annotations

from cache.codecs import Codec, codec_identity
from cache.fingerprint import Fingerprint
from configs.schema import Settings
from extract.detector.frozen import PADDING_DIVISOR, PIXEL_MEAN, PIXEL_STD, FrameDetector


def fingerprint(settings: Settings, detector: FrameDetector, weights_digest: str, codec: Codec) -> Fingerprint:
    """Compose the fingerprint of a cache with these settings and this detector."""
    return composed_fingerprint(
        settings,
        weights_digest,
        codec,
        architecture=detector.architecture,
        precision=detector.precision,
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
    )


def composed_fingerprint(
    settings: Settings,
    weights_digest: str,
    codec: Codec,
    *,
    architecture: str,
    precision: str,
    pixel_mean: tuple[float, ...] = PIXEL_MEAN,
    pixel_std: tuple[float, ...] = PIXEL_STD,
) -> Fingerprint:
    """The same of a detector that is not there yet, such as one that is being trained."""
    return Fingerprint(
        weights_sha256=weights_digest,
        architecture=architecture,
        num_layers=settings.detector.num_layers,
        short_edge=settings.detector.short_edge or 0,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        padding_divisor=PADDING_DIVISOR,
        precision=precision,
        codec=codec_identity(codec),
        decoder=settings.detector.decoder.value,
    )
