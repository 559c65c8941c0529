import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.schedules import Alpha, Piecewise, ScheduleError

EXAMPLE = "; write it like 0:1e-4,18:1e-5,38:0 (from epochs completed) or 0:0.1,5000u:0 (from updates)"


@pytest.mark.parametrize(
    ("alpha", "update", "epoch", "expected"),
    [
        (Alpha(0.5), 1, 1, 0.5),
        (Alpha(0.5), 10**9, 10**6, 0.5),
        (Alpha(0.0, growth=2.0), 10**9, 10**6, 0.0),
        (Alpha(0.5, burn_in=10), 10, 1, 0.0),
        (Alpha(0.5, burn_in=10), 11, 1, 0.5),
        (Alpha(1.0, growth=1.5), 500, 1, 1.0),
        (Alpha(1.0, growth=1.5), 501, 2, 1.5),
        (Alpha(1.0, growth=1.5), 999, 4, 1.5**3),
        (Alpha(1.0, burn_in=600, growth=1.5), 600, 3, 0.0),
        (Alpha(1.0, burn_in=600, growth=1.5), 601, 3, 1.5**2),
        (Alpha(1.0, burn_in=10, growth=2.0, every=5), 11, 1, 1.0),
        (Alpha(1.0, burn_in=10, growth=2.0, every=5), 15, 9, 1.0),
        (Alpha(1.0, burn_in=10, growth=2.0, every=5), 16, 9, 2.0),
        (Alpha(1.0, burn_in=10, growth=2.0, every=5), 21, 9, 4.0),
        (Alpha(1.0, growth=2.0, every=1, cap=3.0), 2, 1, 2.0),
        (Alpha(1.0, growth=2.0, every=1, cap=3.0), 3, 1, 3.0),
        (Alpha(1.0, growth=0.5, every=1), 4, 1, 0.125),
    ],
)
def test_alpha_follows_burn_in_growth_and_cap(alpha, update, epoch, expected):
    assert alpha.at(update, epoch) == expected


@pytest.mark.parametrize("growth", [2, 2.0, 1e300])
def test_growth_without_a_cap_stays_a_float32(growth):
    value = Alpha(1.0, growth=growth, every=1).at(10**6, 1)
    assert 1e38 < value < 2.0**128


def test_growth_beyond_every_float_stops_at_the_cap():
    assert Alpha(1.0, growth=1.5, cap=4.0).at(1, 10**6) == 4.0


def test_a_weight_that_shrinks_ends_at_zero():
    assert Alpha(1.0, growth=0.5, every=1).at(10**6, 1) == 0.0


@given(
    st.floats(0, 1e6),
    st.integers(0, 1000),
    st.floats(1e-3, 1e3),
    st.one_of(st.just("epoch"), st.integers(1, 1000)),
    st.floats(0, math.inf),
    st.integers(1, 10**9),
    st.integers(1, 10**6),
)
def test_alpha_is_finite_and_within_its_cap_everywhere(alpha, burn_in, growth, every, cap, update, epoch):
    value = Alpha(alpha, burn_in, growth, every, cap).at(update, epoch)
    assert 0.0 <= value <= cap
    assert math.isfinite(value)
    assert update > burn_in or value == 0.0


@pytest.mark.parametrize(
    ("text", "update", "epochs", "expected"),
    [
        ("0:1e-4,18:1e-5,38:0", 0, 0.0, 1e-4),
        ("0:1e-4,18:1e-5,38:0", 10**6, 17.99, 1e-4),
        ("0:1e-4,18:1e-5,38:0", 0, 18.0, 1e-5),
        ("0:1e-4,18:1e-5,38:0", 0, 38, 0.0),
        ("0:1e-4,18:1e-5,38:0", 0, 10**6, 0.0),
        ("0:0.1,5000u:0.05", 4999, 10**6, 0.1),
        ("0:0.1,5000u:0.05", 5000, 0.0, 0.05),
        ("0u:0.1,1u:0.2", 1, 0.0, 0.2),
        ("0u:0.1", 7, 3.0, 0.1),
        (" 0 : 0.1 , 1.5 : 0.2 ", 0, 1.5, 0.2),
        ("0:3", 0, 0.0, 3.0),
    ],
)
def test_a_piecewise_value_holds_from_its_start_on(text, update, epochs, expected):
    assert Piecewise.parse(text).at(update=update, epochs=epochs) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is not START:VALUE"),
        ("0.1", "'0.1' is not START:VALUE"),
        ("0:0.1,", "'' is not START:VALUE"),
        ("0:0.1;5:0", "value '0.1;5:0' is not a finite number of at least 0"),
        ("1:0.1", "does not start at 0"),
        ("5u:0.1", "does not start at 0"),
        ("5:0.1,0:0.2", "does not start at 0"),
        ("0:0.1,5:0.2,5:0.3", "start 5 does not come after 5"),
        ("0:0.1,18:0.2,5:0.3", "start 5 does not come after 18"),
        ("0:0.1,0:0.2", "start 0 does not come after 0"),
        ("0:0.1,5:0.2,9u:0.3", "mixes epochs and updates"),
        ("0u:0.1,5:0.2", "mixes epochs and updates"),
        ("0:-1", "value '-1' is not a finite number of at least 0"),
        ("0:nan", "value 'nan' is not a finite number of at least 0"),
        ("0:inf", "value 'inf' is not a finite number of at least 0"),
        ("0:", "value '' is not a finite number of at least 0"),
        ("0:ten", "value 'ten' is not a finite number of at least 0"),
        ("0:0.1,inf:0", "start 'inf' is not a finite number of at least 0"),
        ("-1:0.1", "start '-1' is not a finite number of at least 0"),
        (":0.1", "start '' is not a finite number of at least 0"),
        ("0:0.1,1.5u:0", "start '1.5u' is not a whole number of updates"),
        ("0:0.1,u:0", "start 'u' is not a whole number of updates"),
        ("0:0.1,-3u:0", "start '-3u' is not a whole number of updates"),
        ("0:0.1,9999999999999999u:0", "start '9999999999999999u' is not a whole number of updates"),
    ],
)
def test_a_malformed_schedule_gets_one_line_that_says_what_is_wrong(text, reason):
    with pytest.raises(ScheduleError) as caught:
        Piecewise.parse(text)
    assert str(caught.value) == reason + EXAMPLE


def test_the_example_in_the_message_is_itself_accepted():
    assert Piecewise.parse("0:1e-4,18:1e-5,38:0") == Piecewise((0.0, 18.0, 38.0), (1e-4, 1e-5, 0.0))
    assert Piecewise.parse("0:0.1,5000u:0") == Piecewise((0.0, 5000.0), (0.1, 0.0), in_updates=True)


@given(st.text(alphabet="0123456789:,.ue-+_ nif٣", max_size=30))
def test_any_text_is_a_schedule_or_refused(text):
    with suppress(ScheduleError):
        assert math.isfinite(Piecewise.parse(text).at(update=0, epochs=0.0))
