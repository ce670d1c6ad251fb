"""What looking for duplicates finds, and its time: python -m benchmarks.duplicates NAME [DIR]."""

import sys
import time
from collections import Counter

import codistill as cd
from codistill.data.duplicates import duplicates


def main(name: str, root: str | None = None) -> None:
    """Print counts and times for a data set."""
    data = cd.dataset(name, root=root)
    started, worked = time.perf_counter(), time.process_time()
    found = duplicates(data)
    seconds, busy = time.perf_counter() - started, time.process_time() - worked
    within = Counter(each.split[0] for each in found if each.split[0] == each.other[0])
    between = [each for each in found if each.split[0] != each.other[0]]
    kinds = Counter(each.kind for each in between)
    same = sum(
        data.splits[each.split[0]].labels[each.split[1]] == data.splits[each.other[0]].labels[each.other[1]]
        for each in between
    )
    print(
        f"{data}: {kinds['exact']} exact and {kinds['near']} near duplicates, {same} with the same label; "
        f"equal ones of one split with two labels: {dict(within) or 'none'}; "
        f"{seconds:.1f} s, {busy:.1f} s of the processor"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
