import os
import signal

import pytest


def pytest_configure():
    """A run in the background of a script ignores SIGINT, and so would what is started here to be interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def an_ordinary_process():
    """A loop that was given real time in this process gives it back: whatever is tested or started next is ordinary."""
    yield
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
