"""Make the tables of pages, and a picture, from the ledger of finished runs.

    python benchmarks/ledger.py                                       # README.md, docs/ and results/README.md

A page has its tables between `<!-- ledger: methods small -->` and `<!-- /ledger -->`: a table and a protocol of
`codistill reproduce`, with `differences` behind them those that are paired by seed. docs/methods-small.svg is the
picture of `methods` by protocol small.
"""

from pathlib import Path

from codistill.sweeps.reproduce.cells import protocols
from codistill.sweeps.reproduce.collect import gather
from codistill.sweeps.reproduce.ledger import read_ledger
from codistill.sweeps.reproduce.picture import draw
from codistill.sweeps.reproduce.reproduce import LEDGER, rewritten

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]
PICTURE = ROOT / "docs" / "methods-small.svg"


def main() -> None:
    entries = read_ledger(ROOT / LEDGER)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (now := rewritten(text, entries)) != text:
            page.write_text(now, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: made again")
    if picture := draw("methods", protocols()["small"], gather(entries)):
        PICTURE.write_bytes(picture)


if __name__ == "__main__":
    main()
