"""Backends are found by their names, and a config knows what it must of each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from backends import registry
from backends.api import Backend
from reactor.errors import ReactorError


@pytest.mark.parametrize("name", registry.names())
def test_every_module_that_is_listed_is_a_backend(name: str) -> None:
    found = registry.backend(name)
    assert issubclass(found, Backend)
    assert found.name == name


def test_the_schemas_say_what_a_config_must_know() -> None:
    schemas = registry.schemas()
    assert set(schemas) >= {"file", "malloc", "null"}
    assert len(schemas) == len(registry.names())
    assert [key.name for key in schemas["malloc"].keys] == ["size"]
    assert schemas["malloc"].can_multi_conn


WITHOUT_DESCRIPTORS = """
import errno, resource
from backends import registry

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for look in (registry.names, lambda: registry.backend("malloc")):
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        look()
    except OSError as error:
        assert error.errno == errno.EMFILE, error
    else:
        raise AssertionError("it was known already")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert look()
"""


def test_a_moment_without_descriptors_is_told_and_forgotten() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS], stderr=subprocess.PIPE, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_backend_has_no_schema() -> None:
    with pytest.raises(KeyError):
        registry.schemas()["zfs"]


def test_an_unknown_backend_is_told_with_the_known_ones() -> None:
    with pytest.raises(ReactorError, match=r"no backend is called 'zfs'; there are .*malloc"):
        registry.backend("zfs")
