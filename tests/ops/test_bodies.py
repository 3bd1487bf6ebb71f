"""Each body of kernels/ has one record of its template arguments, in the order of its header."""

import dataclasses
import re

import mlx.core as mx
import pytest

from mhc_mlx import launch, ops
from mhc_mlx.ops.sinkhorn import HalfSteps

WRONG = {int: (True, 1.0, mx.float32), bool: (1, None), mx.Dtype: ("float32", 4)}


def records(cls=launch.Body) -> list[type[launch.Body]]:
    """All records that have a body, of rooms that `ops` imports."""
    below = [record for sub in cls.__subclasses__() for record in records(sub)]
    return below + ([cls] if "name" in vars(cls) else [])


def header_template(body: str) -> list[str]:
    """The names that the header's `template` gives, up to the next word of the header."""
    lines = launch._read(f"{body}.metal").split("\n")
    text = " ".join(line[2:] for line in lines if line.startswith("//"))
    (names,) = re.findall(r"  template  (.*?)(?=  ?[a-z]+  |$)", text)
    return [name.strip() for name in re.sub(r"\([^)]*\)", "", names).split(",")]


def arguments(record: type) -> dict:
    """A value of the right type for each field."""
    values = {int: 4, bool: True, mx.Dtype: mx.float32}
    found = {}
    for f in dataclasses.fields(record):
        found[f.name] = values[f.type] if f.type in values else f.type(**arguments(f.type))
    return found


@pytest.mark.parametrize("record", records(), ids=lambda record: record.name)
def test_a_record_has_the_arguments_of_its_header(record):
    body = record(**arguments(record))
    assert list(body.template) == header_template(record.name)
    assert hash(body) == hash(record(**arguments(record)))


def test_each_body_has_one_record():
    assert ops
    names = sorted(record.name for record in records())
    assert names == sorted(p.stem for p in launch._FOLDERS[1].glob("*.metal"))


@pytest.mark.parametrize("record", [*records(), HalfSteps], ids=lambda record: record.__name__)
def test_a_record_refuses_what_its_body_has_not(record):
    """A field that is missing, unknown or of another type fails at construction."""
    right = arguments(record)
    with pytest.raises(TypeError, match="unexpected keyword argument 'EXTRA'"):
        record(**right, EXTRA=1)
    for f in dataclasses.fields(record):
        with pytest.raises(TypeError, match=f"missing 1 required .*'{f.name}'"):
            record(**{k: v for k, v in right.items() if k != f.name})
        for wrong in WRONG.get(f.type, (4,)):
            with pytest.raises(TypeError, match=rf"\[{record.__name__}\] {f.name} must be of type"):
                record(**right | {f.name: wrong})
