from __future__ import annotations

import inspect
import re

import pytest

from depthsearch import errors

CLASSES = {
    name: item
    for name, item in vars(errors).items()
    if inspect.isclass(item) and issubclass(item, Exception)
}


def test_the_tree_drawn_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawing = [
        line
        for line in (errors.__doc__ or "").splitlines()
        if re.match(r"    [│├└ ]*(─ )?\w+Error\b", line.replace("──", "─"))
        or line.strip() == "DepthsearchError"
        or "StorageError" in line
        or "ClusterError" in line
    ]
    drawn: dict[str, str] = {}
    branch: dict[int, str] = {}
    for line in drawing:
        name = re.search(r"\w+Error", line)
        assert name is not None
        depth = (name.start() - 4) // 4
        branch[depth] = name.group()
        drawn[name.group()] = branch[depth - 1] if depth else "Exception"
    assert drawn == {name: item.__bases__[0].__name__ for name, item in CLASSES.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_has_a_docstring_of_its_own(name: str) -> None:
    assert "__doc__" in vars(CLASSES[name])
    assert CLASSES[name].__doc__


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (name, 1 if item is errors.DepthsearchError else 2)
        for name, item in CLASSES.items()
        if issubclass(item, errors.DepthsearchError)
    ],
)
def test_exit_codes(name: str, code: int) -> None:
    error = CLASSES[name]("what failed")
    assert isinstance(error, errors.DepthsearchError)
    assert error.exit_code == code
    assert str(error) == "what failed"
