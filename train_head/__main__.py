"""Stage two on the command line: train a head from the cache, exchange released heads, count parameters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cache.command import add_verbose, run_command
from cache.progress import is_main
from configs.command import announced_settings
from configs.load import load_settings
from configs.schema import Device


def main() -> int:
    """Parse the command line and run one verb."""
    arguments = _parser().parse_args()
    run = {
        "train": _train,
        "finetune": _finetune,
        "sweep": _sweep,
        "bench": _bench,
        "import-release": _import_release,
        "export-release": _export_release,
        "info": _info,
    }
    return run_command(lambda: run[arguments.verb](arguments), verbose=arguments.verbose)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train_head", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train the head from the cache; goes on from its checkpoint")
    sweep = verbs.add_parser("sweep", help="train and evaluate every combination of settings such as seed=0,1,2")
    finetune = verbs.add_parser("finetune", help="train detector and head from images, or the detector alone")
    for verb in (train, finetune, sweep):
        verb.add_argument("config", help="a YAML file, or the short name of one in configs/")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the config")
    sweep.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the cores (default: %(default)s)")
    bench = verbs.add_parser("bench", help="cost of a training step, against the live detector and plain losses")
    bench.add_argument("--quick", action="store_true", help="fewer steps, and 6 + 3 layers only")
    bench.add_argument("--small", action="store_true", help="a tiny problem: shows in seconds that the bench runs")
    bench.add_argument("--device", choices=[device.value for device in Device], default="cpu")
    bench.add_argument("--output", type=Path, help="JSON to write, such as runs/bench.json")
    importing = verbs.add_parser("import-release", help="make a run of the head in a released VITA checkpoint")
    importing.add_argument("file", type=Path, help="vita.pth: {'model': {'vita_module.*': ...}}, detector included")
    importing.add_argument("--output", type=Path, required=True, help="folder of the run, such as runs/NAME")
    importing.add_argument("--cache", type=Path, required=True, help="what was extracted with the file's detector")
    importing.add_argument("--num-heads", type=int, default=8, help="attention heads (default: %(default)s)")
    importing.add_argument("--window", type=int, default=6, help="frames per window, 0 = all (default: %(default)s)")
    exporting = verbs.add_parser("export-release", help="write a run's head as a VITA checkpoint")
    exporting.add_argument("run", type=Path, help="folder of the run, such as runs/NAME")
    exporting.add_argument("file", type=Path, help="the .pth to write")
    exporting.add_argument("--detector", type=Path, help="official .pkl or .pth whose detector goes into the file")
    info = verbs.add_parser("info", help="parameters of detector and head, and their ratio")
    info.add_argument("config", nargs="?", help="a config; without one, the official detectors with either head")
    info.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the config")
    info.add_argument("--release", type=Path, metavar="FILE", help="a released VITA checkpoint, instead of a config")
    info.add_argument("--classes", type=int, default=40, help="categories, where no labels tell (default: %(default)s)")
    add_verbose(verbs)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from train_head.trainer import train

    settings = announced_settings(arguments.config, arguments.overrides)

    def average_precision() -> float | None:
        from evaluate.stage import score_head  # noqa: TID251  # the command line is where the stages meet

        return score_head(settings)

    folder = train(settings, average_precision)
    if is_main():
        print(f"trained: {folder}")
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from train_head.joint import finetune

    folder = finetune(announced_settings(arguments.config, arguments.overrides))
    if is_main():
        print(f"fine-tuned: {folder}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from train_head.sweep import sweep

    sweep(arguments.config, arguments.overrides, arguments.jobs)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from train_head.bench.step import bench

    return bench(arguments.output, Device(arguments.device), quick=arguments.quick, small=arguments.small)


def _import_release(arguments: argparse.Namespace) -> int:
    from train_head.release import import_file

    print(
        import_file(
            arguments.file,
            arguments.output,
            arguments.cache,
            num_heads=arguments.num_heads,
            window=arguments.window,
        )
    )
    return 0


def _export_release(arguments: argparse.Namespace) -> int:
    from train_head.release import export_file

    print(export_file(arguments.run, arguments.file, arguments.detector))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from train_head.parameter_table import official_table, release_table, settings_table

    if arguments.release is not None:
        print(release_table(arguments.release))
    elif arguments.config is None:
        print(official_table(arguments.classes))
    else:
        print(settings_table(load_settings(arguments.config, arguments.overrides), arguments.classes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
