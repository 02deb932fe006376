"""`python -m evaluate compare`: runs against each other on equal terms."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cache.errors import ConfigError
from evaluate.metrics.bootstrap import RESAMPLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("runs", nargs="+", metavar="[name=]run", help="a run's folder, or name=folder,folder,pattern*")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder of the report")
    parser.add_argument(
        "--with",
        dest="methods",
        nargs="*",
        metavar="method",
        help="shown beside the heads, such as baseline clips5-greedy; without it the baseline, with nothing none",
    )
    parser.add_argument("--allow-differences", action="store_true", help="compare runs of unequal terms, and say so")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="draws of the bootstrap over videos")
    parser.add_argument("--videos", type=int, default=6, help="videos to show, those that changed most")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the table, write the report; the exit status."""
    from evaluate.compare.checks import differences, require_pairs
    from evaluate.compare.groups import read_groups
    from evaluate.compare.report import table, write_comparison
    from evaluate.compare.result import compare

    if arguments.resamples < 1:
        raise ConfigError("no resamples", where="--resamples", expected="1 or more", got=arguments.resamples)
    groups = read_groups(arguments.runs, arguments.methods)
    require_pairs(groups)
    warnings = differences(groups)
    if warnings and not arguments.allow_differences:
        raise ConfigError(
            f"the runs cannot be compared on equal terms: {'; '.join(warnings)}",
            hint="evaluate or train them alike, or add --allow-differences (DIFFER=1 for make) to compare anyway",
        )
    for warning in warnings:
        print(f"WARNING, not on equal terms: {warning}", file=sys.stderr)
    comparison = compare(groups, warnings, resamples=arguments.resamples, num_changed=arguments.videos)
    paths = write_comparison(comparison, groups, arguments.output)
    print(table(comparison))
    print(f"report: {paths.html}, {paths.markdown}, {paths.json}")
    return 0
