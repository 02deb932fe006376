"""Predictions, metrics and reports on the command line: `python -m evaluate run CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from configs.command import run_command
from configs.load import load_settings
from evaluate import score


def main() -> int:
    """Parse the command line and run one verb."""
    parser = argparse.ArgumentParser(prog="python -m evaluate", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="AP of the run's head and of the training-free baseline")
    report = verbs.add_parser("report", help="write the run's self-contained HTML report")
    for verb in (run, report):
        verb.add_argument("config", help="a YAML file, or the short name of one in configs/")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the config")
    score.add_arguments(verbs.add_parser("score", help="AP and AR of any result file on any YTVIS label file"))
    arguments = parser.parse_args()
    command = {"run": _run, "report": _report, "score": score.run}[arguments.verb]
    return run_command(lambda: command(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from evaluate.stage import evaluate
    from evaluate.tables import evaluation_table

    print(evaluation_table(evaluate(load_settings(arguments.config, arguments.overrides))))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from evaluate.report import write_report
    from evaluate.tables import run_summary

    settings = load_settings(arguments.config, arguments.overrides)
    path = write_report(settings)
    print(run_summary(settings))
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
