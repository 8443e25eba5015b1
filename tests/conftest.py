"""What every test may count on: mole's logger as a fresh process has it, whatever command ran in process before."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _fresh_logger():
    logger = logging.getLogger("mole")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
