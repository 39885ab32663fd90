"""``python -m quant_ops info``: the command line."""

import argparse
import json
import sys

from . import info


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status, 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python -m quant_ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser(
        "info", help="what is installed, which kernel each operator uses on this machine, and a self-check"
    )
    info_parser.add_argument("--json", action="store_true", help="for machines and bug reports")
    options = parser.parse_args(arguments)

    report = info.collect()
    print(json.dumps(report, indent=2) if options.json else info.text(report))
    return 0 if report["status"] == "OK" else 1


if __name__ == "__main__":
    sys.exit(main())
