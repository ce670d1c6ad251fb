"""Pages have the tables of the ledger as it is: `python benchmarks/ledger.py` makes them."""

from codistill.sweeps.reproduce.ledger import read_ledger
from codistill.sweeps.reproduce.reproduce import LEDGER, MARKED, rewritten

from ..bench.benchmark_script import script


def test_tables_of_pages_are_those_of_the_ledger(monkeypatch):
    maker = script("ledger", monkeypatch)
    entries = read_ledger(maker.ROOT / LEDGER)
    for page in maker.PAGES:
        text = page.read_text(encoding="utf-8")
        assert rewritten(text, entries) == text, f"{page.name}: python benchmarks/ledger.py"
        assert text.count("\n<!-- ledger: ") == len(MARKED.findall(text)), f"{page.name}: a mark without its end"
