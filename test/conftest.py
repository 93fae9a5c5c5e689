import signal


def pytest_configure():
    """A run in the background of a script ignores SIGINT, and so would what is started here to be interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
