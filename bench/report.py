"""What a run says, from its JSON alone: Markdown tables, and charts where matplotlib is installed.

    python -m bench.report RESULTS.json                            report.md and charts beside it
    python -m bench.report RESULTS.json --readme                   the README's table, printed
    python -m bench.report RESULTS.json --docs docs/performance    the tables and charts that the docs show

In: results.json of `bench.run`, growth.json of `bench.growth` or gpu.json of `bench.gpu`, whole or of a run
that was cut. Out: text and PNG files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import reporting


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", action="store_true", help="print the README's table")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write what the documentation includes")
    given = parser.parse_args()
    data = reporting.read(given.results)
    if given.readme:
        print(reporting.readme(data))
    elif given.docs:
        reporting.write_docs(data, given.docs)
    else:
        print(reporting.write_all(data, given.results.parent))


if __name__ == "__main__":
    main()
