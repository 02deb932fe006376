"""`python -m cache VERB ...`: know, check, move and mend a cache.

PATH is a cache's folder, an HDF5 file (x.h5), or an address (s3://..., gs://..., az://...).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cache.bench.reading import bench
from cache.command import add_verbose, run_command
from cache.progress import with_progress
from cache.reader import FeatureCache
from cache.storage.connection import local_path
from cache.upkeep.inspection import summarise
from cache.upkeep.maintenance import UNREADABLE, differences, prunable, prune, upgrade
from cache.upkeep.staging import stage
from cache.upkeep.transfer import export_hdf5, import_hdf5
from cache.upkeep.upload import upload
from cache.upkeep.verification import verify_root, verify_video

PRUNE = (
    "list videos that are unfinished or not in the labels; at an address, where nothing is locked, unfinished ones are "
    "deleted only when nothing of them has been uploaded for an hour"
)
UPLOAD = (
    "copy a cache in a folder to an address, continuing where it stopped; videos that are there as something else are "
    "replaced"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns 0 where all is well, 1 where `verify` or `diff` found or `prune` left something, else see run_command.
    """
    chosen = _parser().parse_args(arguments)
    return run_command(lambda: _run(chosen), verbose=chosen.verbose)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, text: str, *paths: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text)
        for path in paths:
            command.add_argument(path)
        return command

    verb("inspect", "print counts, sizes and origin", "path").add_argument("--json", action="store_true")
    verb("verify", "check every stored byte", "path").add_argument("--json", action="store_true")
    command = verb("prune", PRUNE, "path")
    command.add_argument("--delete", action="store_true", help="delete them")
    command.add_argument("--unreadable", action="store_true", help="also those whose marker is damaged")
    verb("diff", "say in words what sets two caches apart", "path", "other")
    verb("export", "write a cache to one HDF5 file", "path", "file")
    verb("import", "write the cache of an HDF5 file to a folder", "file", "path")
    verb(
        "stage",
        "copy a cache to a folder on a local disk, continuing where it stopped",
        "path",
        "folder",
    )
    command = verb("upload", UPLOAD, "path", "address")
    command.add_argument("--replace", action="store_true", help="even if no video that is there is the same as here")
    verb("upgrade", "convert a cache of an older format", "path")
    command = verb("bench", "measure reading against bare preadv and other libraries")
    command.add_argument("--folder", type=Path, help="where to write the test data (1 GB); default: the system's")
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.add_argument("--scale", type=float, default=1.0, help="share of the frames, videos and turns")
    for name, text in (
        ("doctor", "check machine, libraries, disk, data and weights (`python -m extract doctor`)"),
        ("estimate", "say what an extraction would need: bytes by codec, hours (`python -m extract estimate`)"),
    ):
        verb(name, text).add_argument("arguments", nargs="*", default=["demo"], help="a config, and key=value settings")
    add_verbose(verbs)
    return parser


def _run(chosen: argparse.Namespace) -> int:
    match chosen.verb:
        case "inspect":
            return inspect(chosen.path, chosen.json)
        case "verify":
            return verify(chosen.path, chosen.json)
        case "prune":
            return prune_videos(chosen.path, chosen.delete, chosen.unreadable)
        case "diff":
            return diff(chosen.path, chosen.other)
        case "export":
            export_hdf5(FeatureCache.open(chosen.path), local_path(chosen.file, "an HDF5 file"))
        case "import":
            import_hdf5(local_path(chosen.file, "an HDF5 file"), local_path(chosen.path, "an imported cache"))
        case "stage":
            stage(chosen.path, local_path(chosen.folder, "a local copy"))
        case "upload":
            upload(Path(chosen.path), chosen.address, replace=chosen.replace)
        case "upgrade":
            print(upgrade(chosen.path))
        case "bench":
            return bench(chosen.folder, chosen.json, chosen.scale)
        case "doctor" | "estimate":  # they load detectors, which this package knows nothing of
            verbose = ["-v"] if chosen.verbose else []
            command = [sys.executable, "-m", "extract", chosen.verb, *chosen.arguments, *verbose]
            return subprocess.run(command, check=False).returncode
    return 0


def inspect(path: str, as_json: bool) -> int:
    """Print the summary of the cache at `path`."""
    summary = summarise(path)
    if as_json:
        print(json.dumps({**asdict(summary), "bytes_per_frame": summary.bytes_per_frame}, indent=2))
        return 0
    print(f"{path}: {summary.videos} videos, {summary.frames} frames, {len(summary.incomplete)} incomplete")
    for view in summary.views if len(summary.views) > 1 else ():
        what = f"{view.videos} views {view.kind}" if view.kind else f"{view.videos} videos"
        print(f"  {what:<28}{view.bytes / 1e6:12.2f} MB")
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


def verify(path: str, as_json: bool) -> int:
    """Print every defect of the cache at `path`, one a line or as JSON."""
    feature_cache = FeatureCache.open(path)
    findings = list(verify_root(feature_cache))
    names = feature_cache.video_names()
    for name in with_progress(names, "verify", unit="video"):
        findings += verify_video(feature_cache, name)
    defects = sum(not finding.warning for finding in findings)
    if as_json:
        print(json.dumps({"videos": len(names), "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.where}: {'warning: ' if finding.warning else ''}{finding.rule}: {finding.message}")
        print(f"{path}: {len(names)} videos, {defects} defects")
    return 1 if defects else 0


def prune_videos(path: str, delete: bool, unreadable: bool) -> int:
    """List what may go and, if asked to, delete it; 1 where other processes write some of it."""
    found = prunable(FeatureCache.open(path))
    for entry in found:
        kept = " (kept, unless --unreadable)" if entry.reason == UNREADABLE and not unreadable else ""
        print(f"{entry.where}: {entry.reason}, {entry.bytes / 1e6:.2f} MB{kept}")
    found = [entry for entry in found if unreadable or entry.reason != UNREADABLE]
    busy = prune(found) if delete else []
    for error in busy:
        print(f"left alone: {error}")
    done = "deleted" if delete else "to delete (nothing done yet; add --delete)"
    size = sum(entry.bytes for entry in found) / 1e6
    print(f"{path}: {len(found)} videos, {size:.2f} MB {done}{f', but for {len(busy)}' if busy else ''}")
    return 1 if busy else 0


def diff(path: str, other: str) -> int:
    """Print what sets two caches apart; `here` is the first, `there` the second."""
    first, second = FeatureCache.open(path), FeatureCache.open(other)
    lines = list(differences(first, second))
    for line in lines:
        print(line)
    same = first.fingerprint == second.fingerprint
    print("the features are interchangeable" if same else "the features are not interchangeable")
    return 1 if any(not line.startswith("origin") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
