import math

import pytest

from codistill.evaluation.seeds import paired, summarise


def test_the_interval_of_a_mean_is_students():
    # t(0.975, 2 degrees of freedom) = 0.95 sqrt(2 / (1 - 0.95^2)) = 4.30265: for two degrees the quantile is closed.
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    found = summarise([52.0, 54.0, 53.0])
    assert (found.count, found.mean, found.deviation, found.best) == (3, 53.0, 1.0, 52.0)
    assert found.low == pytest.approx(53 - half) and found.high == pytest.approx(53 + half)
    assert half == pytest.approx(2.4841, abs=1e-4)


def test_one_error_has_no_interval():
    found = summarise([52.0])
    assert (found.mean, found.best) == (52.0, 52.0)
    assert found.deviation is found.low is found.high is None


def test_differences_are_paired_by_the_seeds_in_common():
    found = paired({2: 51.0, 0: 50.0, 1: 52.0}, {0: 52.0, 1: 53.0, 2: 54.0, 3: 0.0})
    assert found is not None
    assert (found.count, found.mean) == (3, -2.0)
    t = 2 * math.sqrt(3)  # -2, -1, -3: mean -2, deviation 1
    assert found.t_p == pytest.approx(1 - t / math.sqrt(t * t + 2))  # closed for two degrees of freedom
    assert found.sign_p == 0.25  # all three of one sign: 2 / 2^3
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(-2 - half), pytest.approx(-2 + half))


def test_a_sign_test_leaves_out_differences_of_zero():
    found = paired({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 9.0}, {0: 0.0, 1: 1.0, 2: 2.0, 3: 5.0, 4: 9.0})
    assert found is not None
    assert found.sign_p == pytest.approx(10 / 16)  # 3 of 4: 2 (4 + 1) / 2^4


def test_differences_that_are_all_equal_have_no_t_test():
    found = paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0})
    assert found is not None
    assert found.t_p is None and found.sign_p == 0.5
    rounded = paired({0: 50.3, 1: 61.3, 2: 5.3}, {0: 50.0, 1: 61.0, 2: 5.0})  # 0.3 but for the last bits
    assert rounded is not None
    assert rounded.t_p is None and rounded.mean == pytest.approx(0.3)
    nothing = paired({0: 0.1 + 0.2}, {0: 0.3})
    assert nothing is not None and (nothing.mean, nothing.sign_p) == (0.0, 1.0)
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same is not None
    assert (same.mean, same.t_p, same.sign_p) == (0.0, None, 1.0)


def test_one_pair_has_no_interval_and_no_seed_in_common_no_difference():
    one = paired({0: 1.0}, {0: 3.0})
    assert one is not None
    assert (one.count, one.mean, one.low, one.t_p, one.sign_p) == (1, -2.0, None, None, 1.0)
    assert paired({0: 1.0}, {1: 3.0}) is None
