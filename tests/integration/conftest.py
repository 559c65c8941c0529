"""What the tests that start real fairseq processes share."""

import os

import pytest
from filelock import FileLock

from tests.integration.fairseq_trainings import Toy, Trainings


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy corpus, built once in a test session, whatever the number of its processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by the processes of this session
    with FileLock(folder / "toy.lock"):
        if not (folder / "toy").exists():
            Toy.build(folder / "toy-unfinished")
            (folder / "toy-unfinished").rename(folder / "toy")
    return Toy.at(folder / "toy")


@pytest.fixture
def trainings(tmp_path, toy):
    with Trainings(tmp_path, toy) as started:
        yield started
