"""Stage two on the command line: `python -m train_head train CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from configs.command import run_command
from configs.load import load_settings


def main() -> int:
    """Parse the command line and run one verb."""
    parser = argparse.ArgumentParser(prog="python -m train_head", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train the head from the cache; goes on from its checkpoint")
    train.add_argument("config", help="a YAML file, or the short name of one in configs/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the config")
    arguments = parser.parse_args()
    return run_command(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> int:
    from train_head.trainer import train

    folder = train(load_settings(arguments.config, arguments.overrides))
    print(f"trained: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
