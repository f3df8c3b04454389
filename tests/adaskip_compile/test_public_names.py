from __future__ import annotations

import ast
from pathlib import Path

import pytest

import adaskip_compile


@pytest.mark.parametrize("name", adaskip_compile.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(adaskip_compile, name).__name__ == name
    assert name in dir(adaskip_compile)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(adaskip_compile.__file__).read_text())
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = [name.name for node in typed.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(seen) == sorted(adaskip_compile.__all__)


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'adaskip_compile' has no attribute 'no_such_name'"):
        getattr(adaskip_compile, "no_such_name")  # noqa: B009 - a constant name that is not there
