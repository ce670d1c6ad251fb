"""Axes, ticks and the SVG of plots."""

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.report.curves import colour_of
from codistill.report.plots import Axis, Line, Point, line_plot, log_ticks, nice_ticks, number, scatter_plot


def test_ticks_are_round_numbers():
    assert nice_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(0.3, 7) == [2, 4, 6]
    assert nice_ticks(3, 3) == [3]
    for high, ticks in ((2, [1, 2]), (3, [1, 2, 3]), (60, [20, 40, 60])):  # epochs
        assert Axis(1, high, whole=True).ticks() == ticks
    assert Axis(0.5, 1.5, whole=True).ticks() == [1]
    assert log_ticks(0.001, 10) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert log_ticks(2, 6) == [2, 5] and log_ticks(3, 3) == [3]
    assert log_ticks(3.3, 5.1) == pytest.approx([3.5, 4, 4.5, 5])
    assert [number(each) for each in (0, 0.05, 5.0, 1000.0, 1e-6, 0.1 + 0.2)] == [
        "0",
        "0.05",
        "5",
        "1,000",
        "1e-06",
        "0.3",
    ]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.booleans())
def test_every_value_lies_on_its_axis(low, span, log):
    values = [abs(low) + 1e-3, abs(low) + 1e-3 + span] if log else [low, low + span]
    axis = Axis.around(values, log)
    assert 0 <= axis.share(values[0]) <= axis.share(values[1]) <= 1
    assert len(axis.ticks()) <= 16 and all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in axis.ticks())


def test_an_axis_begins_at_zero_where_that_is_near():
    assert Axis.around([1, 9], zero=True).low == 0
    assert Axis.around([88, 92], zero=True).low >= 85
    assert Axis.around([math.nan, math.inf]) == Axis(0.5, 1.5)  # of nothing: some axis
    assert Axis.around([0.0, 1.0, 10.0], log=True) == Axis(1.0, 10.0, log=True)
    assert Axis.around([0.1, math.nextafter(0.1, 1)], log=True).share(0.1) == pytest.approx(0.5)  # a mean of equals


def paths(svg: str, kind: str) -> list[str]:
    return [each.get("d", "") for each in ET.fromstring(svg).iter("path") if kind in each.get("class", "").split()]


def test_a_line_goes_through_its_points_and_its_band_around_it():
    line = Line(name="a < b", x=[1, 2, 3], y=[0, 5, 10], low=[0, 4, 9], high=[1, 6, 10])
    svg = line_plot("title & more", "what it shows", [line], "epoch")
    assert paths(svg, "line") == ["M0 1000L500 500L1000 0"]
    assert paths(svg, "band") == ["M0 900L500 400L1000 0L1000 100L500 600L0 1000Z"]
    texts = {each.tag: each.text for each in ET.fromstring(svg)}
    assert texts["title"] == "title & more" and texts["desc"] == "title & more. what it shows"


def test_what_a_logarithmic_axis_cannot_show_is_left_out():
    line = Line(name="loss", x=[1, 2, 3, 4], y=[0.0, 1.0, math.nan, 100.0])
    assert paths(line_plot("t", "d", [line], "epoch", log=True), "line") == ["M333 1000L1000 0"]
    none = Line(name="loss", x=[1, 2], y=[0.0, 0.0])
    assert paths(line_plot("t", "d", [none], "epoch", log=True), "line") == []


def test_a_single_epoch_is_a_dot_and_a_thousand_are_thinned():
    (dot,) = paths(line_plot("t", "d", [Line(name="n", x=[1], y=[3])], "epoch"), "dot")
    assert dot == "M500 500h0"
    (many,) = paths(line_plot("t", "d", [Line(name="n", x=range(5000), y=range(5000))], "epoch"), "line")
    assert many.count("L") < 500 and many.endswith("1000 0")


def test_points_on_the_front_are_filled_and_joined():
    points = [
        Point(name="a", x=1, y=30, colour="c0", best=True, low=28, high=33),
        Point(name="b", x=10, y=20, colour="c1", best=True),
        Point(name="c", x=20, y=40, colour="c2"),
    ]
    svg = scatter_plot("t", "d", points, "ms")
    circles = [each.get("class", "") for each in ET.fromstring(svg).iter("circle")]
    assert [each.split()[1] for each in circles] == ["best", "best", "other"]
    assert len(paths(svg, "thin")) == 1 and svg.count('class="bar') == 1


def test_an_average_of_weights_has_the_colour_of_its_student():
    assert colour_of("student1-ema") == colour_of("student1") != colour_of("student0")
    assert colour_of("fused-ema") == colour_of("fused")
