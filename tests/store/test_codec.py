"""Records written to JSON and read back, and files that do not fit a record."""

import json
from dataclasses import dataclass

import pytest

from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import (
    Decision,
    Layer,
    Measurement,
    Shape,
    Signature,
    Verdict,
)
from fp8tune.errors import CacheError
from fp8tune.store.codec import decode, encode
from fp8tune.store.sealing import UNSEALED, seal, unseal

SHAPE = Shape(4096, 1024, 512, "bfloat16", "float32", None, True)
SIGNATURE = Signature(SHAPE, grad_input=True, grad_weight=False, grad_bias=True)
RECORDS = [
    SHAPE,
    SIGNATURE,
    Layer("größe.wq", 1024, 512, "float32", True, None, ((SIGNATURE, 3),)),
    Layer("lm_head", 1024, 512, "float32", True, Reason.FILTERED_BY_NAME),
    Measurement(SIGNATURE, "rowwise", (1.5, 0.1), (1e-7, 2.0), synthetic=True),
    Measurement(SIGNATURE, "rowwise", failure=Reason.OUT_OF_MEMORY, detail='of "it"'),
    Decision(
        "wq",
        1024,
        512,
        Verdict.CONVERTED,
        Reason.FASTER,
        recipe="rowwise",
        signatures=((SIGNATURE, 3), (SIGNATURE, 1)),
        reference_ms=1.5,
        candidate_ms=1.0,
        speedup=1.5,
        samples=16,
    ),
]


@dataclass(frozen=True)
class Labels:
    """What no record has yet: a dict."""

    labels: dict[str, str]


@dataclass(frozen=True)
class Whole:
    """A file as small as can be."""

    format: str
    version: int
    sha256: str
    shapes: tuple[Shape, ...]


WHOLE = Whole("shapes", 1, UNSEALED, (SHAPE, SHAPE))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_from_json_as_it_was(record):
    text = json.dumps(encode(record), allow_nan=False)
    assert decode(type(record), json.loads(text), "record") == record


def test_a_dict_comes_back_from_json_as_it_was():
    record = Labels({"gpu": "NVIDIA H200", "torch": "2.13.0"})
    assert decode(Labels, json.loads(json.dumps(encode(record))), "x") == record


def test_an_integer_is_read_as_a_float_where_a_float_belongs():
    milliseconds = decode(tuple[float, ...], [1, 2.5], "reference_ms")
    assert milliseconds == (1.0, 2.5)
    assert [type(value) for value in milliseconds] == [float, float]


def test_a_string_of_a_subclass_is_written_as_a_plain_string():
    class Version(str):
        __slots__ = ()

    assert type(encode(Version("2.13.0"))) is str


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "x: found True, expected an integer"),
        (int, 1.0, "x: found 1.0, expected an integer"),
        (int, None, "x: found None, expected an integer"),
        (bool, 1, "x: found 1, expected true or false"),
        (str, 1, "x: found 1, expected a string"),
        (float, True, "x: found True, expected a finite number"),
        (float, "1.0", "x: found '1.0', expected a finite number"),
        (float, float("nan"), "x: found nan, expected a finite number"),
        (float, float("-inf"), "x: found -inf, expected a finite number"),
        (float, 10**400, r"x: found 1000\S*, expected a finite number"),
        (str | None, [], r"x: found \[\], expected a string"),
        (Verdict, "bf16", "x: found 'bf16', expected one of 'converted', 'reference'"),
        (Verdict, ["float8"], r"x: found \['float8'\], expected one of 'converted'"),
        (tuple[int, ...], {}, "x: found {}, expected a list"),
        (tuple[int, ...], [0, "1"], r"x\[1\]: found '1', expected an integer"),
        (tuple[int, str], [0], r"x: found \[0\], expected a list of 2"),
        (tuple[int, str], [0, 1], r"x\[1\]: found 1, expected a string"),
        (dict[str, str], [], r"x: found \[\], expected an object"),
        (dict[str, str], {"gpu": 1}, r"x\.gpu: found 1, expected a string"),
        (Shape, [], r"x: found \[\], expected an object with the keys m, k, n"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_place(kind, value, message):
    with pytest.raises(CacheError, match=f"^{message}"):
        decode(kind, value, "x")


def test_the_place_of_an_error_leads_through_nested_records():
    value = encode(RECORDS[2])
    value["calls"][0][0]["shape"]["m"] = "4096"
    place = r"^layers\[3\]\.calls\[0\]\[0\]\.shape\.m: found '4096', expected an int"
    with pytest.raises(CacheError, match=place):
        decode(Layer, value, "layers[3]")


def test_a_missing_key_is_named_even_if_its_field_has_a_default():
    value = encode(SIGNATURE)
    del value["recompute"]
    with pytest.raises(
        CacheError, match=r"^s: found an object without 'recompute', exp"
    ):
        decode(Signature, value, "s")


def test_an_unknown_key_is_named():
    value = {**encode(SHAPE), "dilation": 1}
    with pytest.raises(
        CacheError, match=r"^s: found unknown keys 'dilation', expected"
    ):
        decode(Shape, value, "s")


def test_a_long_and_deep_value_makes_a_short_message():
    value: list = []
    for _ in range(500):
        value = [value] * 2
    with pytest.raises(CacheError, match="expected an integer") as caught:
        decode(int, value, "x")
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes"])
def test_what_json_cannot_hold_is_refused_before_it_is_written(value):
    with pytest.raises(CacheError, match="expected a record, a tuple, a finite number"):
        encode((value,))


def test_a_sealed_file_has_one_entry_a_line_and_comes_back():
    data = seal(WHOLE)
    assert len(data.splitlines()) == 9
    found = decode(Whole, unseal(data, "shapes", [1]), "")
    assert found.shapes == WHOLE.shapes


def test_every_changed_byte_of_a_sealed_file_is_noticed():
    data = seal(WHOLE)
    for place, byte in enumerate(data):
        for other in {byte ^ 1, byte ^ 32, 32} - {byte}:
            changed = data[:place] + bytes([other]) + data[place + 1 :]
            with pytest.raises(CacheError, match=r"expected|checksum|JSON"):
                unseal(changed, "shapes", [1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found no JSON in UTF-8"),
        (b"\xff\xfe{}", "found no JSON in UTF-8"),
        (b"[" * 100_000, "found no JSON in UTF-8"),
        (b"9" * 5000, "found no JSON in UTF-8"),
        (b"[]", r"the top level: found \[\], expected an object"),
        (b"{}", "format: found None, expected a string"),
        (b'{"format": "plan"}', "format: found 'plan', expected 'shapes'"),
        (b'{"format": "shapes", "version": 2}', "version: found 2, expected 1"),
        (
            b'{"format": "shapes", "version": 1}',
            "sha256: found None, expected a string",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(data, message):
    with pytest.raises(CacheError, match=f"^{message}"):
        unseal(data, "shapes", [1])


@pytest.mark.parametrize("odd", [float("inf"), float("nan"), True, "1.0", None])
def test_one_odd_value_among_many_times_is_named_by_its_place(odd):
    with pytest.raises(CacheError, match=r"times\[2\]: found .*a finite number"):
        decode(tuple[float, ...], [1.0, 2.0, odd, 3.0], "times")


@pytest.mark.parametrize("times", [(1e308, 1e308, 1e308), (1.0, 2.0), ()])
def test_finite_times_come_back_be_their_sum_finite_or_not(times):
    assert encode(times) == list(times)
    assert decode(tuple[float, ...], list(times), "times") == times


def test_integers_among_times_become_floats():
    read = decode(tuple[float, ...], [1, 2.5], "times")
    assert read == (1.0, 2.5)
    assert [type(x) for x in read] == [float, float]


@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_no_time_without_a_number_is_written(odd):
    with pytest.raises(CacheError, match="expected a record"):
        encode((1.0, odd))
