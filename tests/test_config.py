"""The knobs: what they take and what they refuse."""

import dataclasses

import pytest

from fp8tune.config import OnShapeChange, StaticFilter, Timing, TuneConfig
from fp8tune.errors import ConfigError, Fp8TuneError


def test_the_defaults_are_documented_values():
    config = TuneConfig()
    assert config.static_filter is StaticFilter.SMALL_KN
    assert config.timing is Timing.AUTO
    assert config.on_shape_change is OnShapeChange.RETUNE
    assert config.min_speedup == 1.0
    assert config.confidence == 0.95
    assert config.capture_bytes is None


@pytest.mark.parametrize(
    ("knob", "member"),
    [
        *(("static_filter", member) for member in StaticFilter),
        *(("timing", member) for member in Timing),
        *(("on_shape_change", member) for member in OnShapeChange),
    ],
)
def test_strings_are_as_good_as_enum_members(knob, member):
    config = TuneConfig(**{knob: str(member)})
    assert getattr(config, knob) is member
    assert config == TuneConfig(**{knob: member})


@pytest.mark.parametrize(
    ("knob", "known"),
    [
        ("static_filter", "'small_kn', 'divisible'"),
        ("timing", "'auto', 'compiled', 'eager'"),
        ("on_shape_change", "'retune', 'warn', 'raise'"),
    ],
)
@pytest.mark.parametrize("value", ["auto_filter", "AUTO", "", None, 3, True])
def test_an_unknown_choice_lists_the_known(knob, known, value):
    with pytest.raises(
        ConfigError, match=f"{knob} is {value!r}; choose one of {known}"
    ):
        TuneConfig(**{knob: value})


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("min_speedup", 1e-9),
        ("min_speedup", 2),
        ("confidence", 1e-9),
        ("confidence", 1 - 1e-9),
        ("max_samples", 8),
        ("max_seconds", 1e-9),
        ("max_seconds", 60),
        ("capture_bytes", 0),
        ("capture_bytes", 1),
    ],
)
def test_values_just_inside_the_range_are_taken(knob, value):
    assert getattr(TuneConfig(**{knob: value}), knob) == value


@pytest.mark.parametrize(
    ("knob", "value", "expected"),
    [
        ("min_speedup", 0, "above 0"),
        ("min_speedup", -1.0, "above 0"),
        ("min_speedup", float("nan"), "above 0"),
        ("confidence", 0, "between 0 and 1"),
        ("confidence", 1.0, "between 0 and 1"),
        ("confidence", 95, "between 0 and 1"),
        ("max_samples", 7, "8 to 4,096"),
        ("max_samples", 4097, "8 to 4,096"),
        ("max_seconds", 0, "above 0 seconds"),
        ("max_seconds", float("nan"), "above 0 seconds"),
        ("capture_bytes", -1, "None, or 0 bytes and more"),
    ],
)
def test_values_just_outside_the_range_are_refused(knob, value, expected):
    with pytest.raises(
        ConfigError, match=f"{knob} is {value!r}; it must be {expected}"
    ):
        TuneConfig(**{knob: value})


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("min_speedup", "1.1"),
        ("confidence", None),
        ("max_samples", "16"),
        ("max_samples", 8.5),
        ("max_seconds", "1"),
        ("capture_bytes", "2%"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(knob, value):
    with pytest.raises(ConfigError, match=f"{knob} is {value!r}"):
        TuneConfig(**{knob: value})


def test_a_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, Fp8TuneError)


def test_an_unknown_knob_is_refused():
    with pytest.raises(TypeError, match="min_sppedup"):
        TuneConfig(min_sppedup=1.1)


def test_knobs_are_given_by_name():
    with pytest.raises(TypeError, match="positional argument"):
        TuneConfig("small_kn")


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError, match="min_speedup"):
        TuneConfig().min_speedup = 2.0


def test_a_replaced_knob_is_checked_again():
    with pytest.raises(ConfigError, match="min_speedup is 0"):
        dataclasses.replace(TuneConfig(), min_speedup=0)
