"""The table of docs/reliability.md names the tests of every fault."""

from . import table


def test_every_case_has_a_test():
    missing = [number for number, names in table.tests_by_case().items() if not names]
    assert not missing, f"no test is marked pytest.mark.fault of these cases: {missing}"


def test_the_page_is_up_to_date():
    assert table.page() == table.PAGE.read_text(encoding="utf-8"), "run python -m tests.faults.table"
