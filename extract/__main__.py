"""Stage one on the command line: `python -m extract run CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cache.command import add_verbose, run_command
from configs.command import announced_settings
from configs.load import load_settings


def main() -> int:
    """Parse the command line and run one verb."""
    parser = argparse.ArgumentParser(prog="python -m extract", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the frozen detector over every video not yet in the cache")
    data = verbs.add_parser("demo-data", help="generate the demo's videos where the config expects them")
    calibrate = verbs.add_parser("calibrate", help="measure the codecs on sample frames, without extracting")
    estimate = verbs.add_parser("estimate", help="say what an extraction would need: bytes by codec, hours")
    bench = verbs.add_parser("bench", help="compare extraction with the bare detector on the same frames")
    doctor = verbs.add_parser("doctor", help="check machine, libraries, disk, data and weights, with remedies")
    for verb in (run, data, calibrate, estimate, bench, doctor):
        verb.add_argument("config", help="a YAML file, or the short name of one in configs/")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the config")
    bench.add_argument("--small", action="store_true", help="few and tiny frames: shows in seconds that the bench runs")
    bench.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    run.add_argument(
        "--skip-errors", action="store_true", help="as extract.skip_errors=true: leave unreadable videos out"
    )
    run.add_argument("--clear-dead-locks", action="store_true", help="take over videos of writers that died elsewhere")
    data.add_argument("--long", type=int, default=0, metavar="N", help="also N videos of 300 frames, the split `long`")
    video = verbs.add_parser("video", help="extract videos of your own, without labels, into <cache.path>/video")
    video.add_argument("--head", type=Path, help="folder of the run that will read the features: checked beforehand")
    video.add_argument("--stride", type=int, default=1, help="take every n-th frame")
    video.add_argument("config", help="a YAML file, or the short name of one in configs/")
    words = "video files, folders of images, .txt lists of either; and settings that differ from the config"
    video.add_argument("words", nargs="+", metavar="FILE|key=value", help=words)
    clip = verbs.add_parser("demo-clip", help="generate an .mp4 of moving shapes")
    clip.add_argument("output", type=Path)
    clip.add_argument("--seed", type=int, default=0)
    clip.add_argument("--frames", type=int, default=36)
    balance = verbs.add_parser("balance", help="simulate many workers: idle time, hours, bytes, costs")
    balance.add_argument("--workers", type=int, default=64)
    balance.add_argument("--videos", type=int, default=10_000)
    balance.add_argument("--speed", type=float, default=40.0, help="frames a second of a worker; measure yours: bench")
    balance.add_argument("--overhead", type=float, default=0.1, help="seconds a video beside its frames")
    balance.add_argument("--gpu-hour", type=float, default=2.5, help="price of a GPU hour")
    balance.add_argument("--terabyte-month", type=float, default=23.0, help="price of storage")
    add_verbose(verbs)
    arguments = parser.parse_args()
    return run_command(lambda: _run(arguments), verbose=arguments.verbose)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "video":
        from extract.video import extract_footage

        extract_footage(arguments.config, arguments.words, head=arguments.head, stride=arguments.stride)
        return 0
    if arguments.verb == "balance":
        from extract.workers.balance import Rates, print_balance

        rates = Rates(
            frames_per_second=arguments.speed,
            seconds_per_video=arguments.overhead,
            dollars_per_gpu_hour=arguments.gpu_hour,
            dollars_per_terabyte_month=arguments.terabyte_month,
        )
        print_balance(arguments.workers, arguments.videos, rates)
        return 0
    if arguments.verb == "demo-clip":
        from extract.demo.clip import write_clip

        write_clip(arguments.output, seed=arguments.seed, num_frames=arguments.frames)
        return 0
    load = announced_settings if arguments.verb == "run" else load_settings
    settings = load(arguments.config, arguments.overrides)
    if arguments.verb == "demo-data":
        from extract.demo.videos import NUM_STILLS, write_demo_data

        num_stills = NUM_STILLS if settings.pseudo.ratio > 0 else 0
        write_demo_data(Path(settings.data.root), num_long=arguments.long, num_stills=num_stills)
    elif arguments.verb == "calibrate":
        from extract.stage import print_rate_distortion

        print_rate_distortion(settings)
    elif arguments.verb == "estimate":
        from extract.estimate import print_estimate

        print_estimate(settings)
    elif arguments.verb == "bench":
        from extract.bench import SMALL, Amount, bench_extraction

        bench_extraction(settings, SMALL if arguments.small else Amount(), arguments.output)
    elif arguments.verb == "doctor":
        from extract.doctor import doctor

        return doctor(settings)
    else:
        from extract.stage import extract

        settings.extract.skip_errors |= arguments.skip_errors
        extract(settings, clear_dead_locks=arguments.clear_dead_locks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
