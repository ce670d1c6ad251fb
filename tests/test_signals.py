"""A signal acts after the step in which it came, whatever that step does with exceptions."""

import contextlib
import os
import signal
import threading

import pytest

from codistill.signals import deferred


class Stopped(BaseException):
    pass


def stop(*_: object) -> None:
    raise Stopped


@pytest.fixture(autouse=True)
def handler():
    # A shell may have started the tests with SIGINT ignored.
    before = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, own) for number, own in before.items()}
    yield
    for number, old in before.items():
        signal.signal(number, old)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_it_waits_and_is_not_swallowed(number, kind):
    with pytest.raises(kind), deferred() as act:
        act()
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
        act()
        pytest.fail("the signal was lost")
    with pytest.raises(kind):  # the handlers of before are back
        os.kill(os.getpid(), number)


def test_a_second_one_acts_at_once():
    with pytest.raises(Stopped), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the second signal waited")


def test_a_signal_without_a_handler_in_python_keeps_its_effect():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with deferred():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_set_no_handlers():
    seen = []

    def work():
        with deferred() as act:
            act()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [stop]
