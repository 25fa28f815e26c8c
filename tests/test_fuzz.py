"""The readers of other people's files, briefly; `python -m reliability.fuzz` goes on for longer."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from evm_deploy.errors import UsageError
from reliability import fuzz

MUTATIONS = 150
BUNDLES = {"onnx": "demo_bundle", "coreml": "coreml_bundle"}


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it reads all the same
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_whatever_is_read_is_accepted_or_refused(name, tmp_path, request):
    target, corpus = fuzz.TARGETS[name], fuzz.seeds(name)
    count = MUTATIONS
    if target.bundle:
        shutil.copytree(request.getfixturevalue(BUNDLES[target.bundle]).path, tmp_path, dirs_exist_ok=True)
        count = 40
    if target.prepare:
        corpus += target.prepare(tmp_path)
    for data in (*corpus, *itertools.islice(fuzz.mutations(target, corpus, seed=0), count)):
        try:
            fuzz.attempt(target, data, tmp_path)
        except Exception as error:
            kept = fuzz.keep(data, name, tmp_path)
            raise AssertionError(f"{type(error).__name__} for the input {kept}") from error


@pytest.mark.parametrize("name", [name for name, target in fuzz.TARGETS.items() if not target.bundle])
def test_the_corpus_reaches_what_is_behind_the_checks(name, tmp_path):
    """Something in it is accepted, else mutations of it would only ever try the first check."""
    target = fuzz.TARGETS[name]
    prepared = target.prepare(tmp_path) if target.prepare else []
    assert all(fuzz.attempt(target, data, tmp_path) for data in prepared)
    assert any(fuzz.attempt(target, data, tmp_path) for data in (*fuzz.seeds(name), *prepared))


def raises(error: BaseException):
    def read(path: Path) -> object:
        raise error

    return fuzz.Target("x", read)


def test_the_harness_tells_errors_from_crashes(tmp_path):
    assert fuzz.attempt(raises(UsageError("no")), b"", tmp_path) is False
    assert fuzz.attempt(fuzz.Target("x", Path.read_bytes), b"", tmp_path) is True
    for error in (KeyError("x"), UsageError(""), RecursionError()):
        with pytest.raises((KeyError, AssertionError, RecursionError)):
            fuzz.attempt(raises(error), b"", tmp_path)


def test_mutations_are_repeatable_and_differ():
    target, corpus = fuzz.TARGETS["record"], fuzz.seeds("record")
    once, again = (list(itertools.islice(fuzz.mutations(target, corpus, seed=4), 50)) for _ in range(2))
    assert once == again and len(set(once)) > 40
