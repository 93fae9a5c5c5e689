import os
import signal

import pytest

# Before anything imports torch, here and in what is started: the policies of the tests are so small that its threads
# would only wait for one another, and on a busy machine take minutes for what one does in seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
