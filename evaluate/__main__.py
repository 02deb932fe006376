"""Predictions, metrics and reports on the command line: `python -m evaluate run CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cache.command import add_verbose, run_command
from configs.command import announced_settings, device_name
from configs.load import load_settings
from configs.schema import Device
from evaluate import score
from evaluate.compare import command as compare
from evaluate.pictures.overlays import MIN_SCORE


def main() -> int:
    """Parse the command line and run one verb."""
    parser = argparse.ArgumentParser(prog="python -m evaluate", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="AP of the run's head and of the training-free baseline")
    report = verbs.add_parser("report", help="write the run's self-contained HTML report")
    report.add_argument("--beside", type=Path, action="append", default=[], metavar="RUN", help="show another run too")
    words = "show this method of the run beside its head, such as clips5-greedy; by default the baseline"
    report.add_argument("--with", dest="methods", action="append", metavar="METHOD", help=words)
    ablate = verbs.add_parser("ablate", help="the paper's inference tables from one cache and one head")
    ablate.add_argument("what", choices=("windows", "pruning", "association", "topk"), help="what is varied")
    for verb in (run, report, ablate):
        verb.add_argument("config", help="a YAML file, or the short name of one in configs/")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the config")
    predict = verbs.add_parser("predict", help="tracks, overlay and contact sheet of videos of your own")
    predict.add_argument("--head", type=Path, required=True, help="folder of the run")
    predict.add_argument("--output", type=Path, required=True, help="each video gets a folder in it")
    predict.add_argument("--score", type=float, default=MIN_SCORE, help="draw tracks of at least this score, 0 to 1")
    predict.add_argument("config", help="a YAML file, or the short name of one in configs/")
    predict.add_argument("features", type=Path, help="what `python -m extract video` wrote: <cache.path>/video")
    predict.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the config")
    score.add_arguments(verbs.add_parser("score", help="AP and AR of any result file on any YTVIS label file"))
    compare.add_arguments(verbs.add_parser("compare", help="runs against each other: intervals, parts, errors"))
    _add_plot(verbs)
    _add_benchmarks(verbs)
    add_verbose(verbs)
    arguments = parser.parse_args()
    commands = {
        "run": _run,
        "report": _report,
        "predict": _predict,
        "score": score.run,
        "compare": compare.run,
        "plot": _plot,
        "ablate": _ablate,
        "bench": _bench,
        "bench-memory": _bench_memory,
        "max-frames": _max_frames,
    }
    return run_command(lambda: commands[arguments.verb](arguments), verbose=arguments.verbose)


def _add_plot(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plot = verbs.add_parser("plot", help="a figure for a paper: convergence, windows, pruning, gap closed")
    plot.add_argument("what", choices=("convergence", "windows", "pruning", "gap"), help="convergence: VITA's Fig. 5")
    words = "name=run,run,pattern* (the seeds of one line), or a run's folder; of gap: comparison.json"
    plot.add_argument("sources", nargs="+", metavar="SOURCE", help=words)
    plot.add_argument("--output", type=Path, required=True, help="file to write: .png, .svg or .pdf")
    plot.add_argument("--low", help="of gap: the row that stands for 0 %% (default: the first)")
    plot.add_argument("--high", help="of gap: the row that stands for 100 %% (default: the one of highest AP)")


def _add_benchmarks(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = verbs.add_parser("bench", help="inference of a video against the plain way, in one run")
    bench.add_argument("--output", type=Path, help="write the figures here too (JSON)")
    bench.add_argument("--small", action="store_true", help="a tiny video: shows in seconds that the bench runs")
    memory = verbs.add_parser("bench-memory", help="peak memory against the length of the video")
    frames = verbs.add_parser("max-frames", help="the longest video that fits: at once and streaming")
    frames.add_argument("--memory", default="12GiB", help="such as 12GiB")
    frames.add_argument("--windows", type=int, nargs="+", default=[3, 6, 12], help="frames that see each other")
    kept = "shares of the frame queries that pruning keeps"
    frames.add_argument("--kept", type=float, nargs="+", default=[1.0, 0.75, 0.25], help=kept)
    for verb in (memory, frames):
        verb.add_argument("--device", type=Device, default=Device.auto, choices=list(Device), metavar="auto|cpu|cuda")


def _run(arguments: argparse.Namespace) -> int:
    from evaluate.stage import evaluate
    from evaluate.tables import evaluation_table

    print(evaluation_table(evaluate(announced_settings(arguments.config, arguments.overrides))))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from evaluate.report.write import write_report
    from evaluate.tables import run_summary

    settings = load_settings(arguments.config, arguments.overrides)
    path = write_report(settings, arguments.beside, arguments.methods)
    print(run_summary(settings))
    print(f"report: {path}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from evaluate.predict import predict

    settings = load_settings(arguments.config, arguments.overrides)
    for done in predict(settings, arguments.head, arguments.features, arguments.output, arguments.score):
        seen = f"{done.drawn} of {done.tracks} tracks drawn (score {arguments.score:g} or more)"
        kept = ", as before" if done.kept else ""
        files = f"{done.folder}: tracks.json, overlay.mp4, contact_sheet.png{kept}"
        print(f"{files}; {len(done.footage.seconds)} frames, {seen}")
        if done.footage.problem is not None:
            print(f"warning: {done.footage.source}: {done.footage.problem}")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from evaluate.plot import plot

    print(f"written: {plot(arguments.what, arguments.sources, arguments.output, arguments.low, arguments.high)}")
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    from evaluate.ablate import ablate

    print(ablate(arguments.what, load_settings(arguments.config, arguments.overrides)))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from evaluate.bench.inference import SMALL, VideoProblem, bench

    return bench(arguments.output, SMALL if arguments.small else VideoProblem())


def _bench_memory(arguments: argparse.Namespace) -> int:
    from evaluate.bench.memory import bench_memory

    return bench_memory(device_name(arguments.device))


def _max_frames(arguments: argparse.Namespace) -> int:
    from evaluate.bench.max_frames import max_frames, parse_bytes

    device = device_name(arguments.device)
    return max_frames(parse_bytes(arguments.memory), device, arguments.windows, arguments.kept)


if __name__ == "__main__":
    sys.exit(main())
