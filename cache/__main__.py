"""`python -m cache inspect|verify PATH`: what is in a cache, and is it sound?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from cache.errors import VitaCacheError
from cache.inspection import summarise, verify_root, verify_video
from cache.reader import FeatureCache


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0 where all is well, 1 where `verify` found defects, 2 for input errors."""
    parser = argparse.ArgumentParser(prog="python -m cache", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("inspect", "print counts, sizes and origin"), ("verify", "check every stored byte")):
        command = verbs.add_parser(verb, help=text, description=text)
        command.add_argument("path", type=Path, help="the cache's folder")
        command.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(arguments)
    try:
        return inspect(chosen.path, chosen.json) if chosen.verb == "inspect" else verify(chosen.path, chosen.json)
    except VitaCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def inspect(path: Path, as_json: bool) -> int:
    """Print the summary of the cache at `path`."""
    summary = summarise(path)
    if as_json:
        print(json.dumps({**asdict(summary), "bytes_per_frame": summary.bytes_per_frame}, indent=2))
        return 0
    print(f"{path}: {summary.videos} videos, {summary.frames} frames, {len(summary.incomplete)} incomplete")
    print(f"  mask features   {summary.mask_feature_bytes / 1e6:12.2f} MB")
    print(f"  frame queries   {summary.frame_query_bytes / 1e6:12.2f} MB")
    print(f"  bytes a frame   {summary.bytes_per_frame:12.0f}")
    print(f"fingerprint {summary.fingerprint_sha256}")
    for key, value in summary.fingerprint.to_json().items():
        print(f"  {key:16} {value}")
    for session in summary.provenance:
        print("written by")
        for key, value in session.items():
            print(f"  {key:16} {value}")
    return 0


def verify(path: Path, as_json: bool) -> int:
    """Print every defect of the cache at `path`, one a line or as JSON."""
    feature_cache = FeatureCache.open(path)
    findings = list(verify_root(feature_cache))
    names = feature_cache.video_names()
    for name in tqdm(names, desc="verify", unit="video", delay=2):
        findings += verify_video(feature_cache, name)
    if as_json:
        print(json.dumps({"videos": len(names), "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.where}: {finding.rule}: {finding.message}")
        print(f"{path}: {len(names)} videos, {len(findings)} defects")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
