"""A signal acts when the run has been saved, whatever the step does with exceptions."""

import contextlib
import os
import signal
import threading

import pytest

from codistill.core.signals import Interrupted, Terminated, defer_signals, terminate


class Stopped(BaseException):
    pass


def stop(*_: object) -> None:
    raise Stopped


@pytest.fixture(autouse=True)
def handler():
    # A shell may have started the tests with SIGINT ignored.
    before = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler, signal.SIGUSR1: signal.SIG_DFL}
    before = {number: signal.signal(number, own) for number, own in before.items()}
    yield
    for number, old in before.items():
        signal.signal(number, old)


@pytest.mark.parametrize(
    ("number", "own", "kind"),
    [
        (signal.SIGTERM, stop, Stopped),
        (signal.SIGTERM, terminate, Terminated),
        (signal.SIGTERM, signal.SIG_DFL, Terminated),
        (signal.SIGINT, signal.default_int_handler, Interrupted),
        (signal.SIGINT, signal.SIG_DFL, KeyboardInterrupt),
        (signal.SIGINT, stop, Stopped),
    ],
)
def test_it_waits_and_is_not_swallowed(number, own, kind):
    signal.signal(number, own)
    with pytest.raises(kind) as stopped, defer_signals() as pending:
        assert pending.stopping is None
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
        assert pending.stopping == number
        pending.act("after step 3")
        pytest.fail("the signal was lost")
    assert kind is Stopped or "after step 3" in str(stopped.value)
    assert signal.getsignal(number) is own  # as before


def test_sigterm_ends_a_program_with_143():
    with pytest.raises(SystemExit) as stopped:
        terminate()
    assert stopped.value.code == 143


def test_a_second_one_acts_at_once_and_another_one_does_not_overtake_the_first():
    with pytest.raises(Stopped), defer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the second signal waited")
    with pytest.raises(Stopped), defer_signals() as pending:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pending.act("now")


def test_a_program_whose_own_handler_returns_goes_on():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with defer_signals() as pending:
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == []
        pending.act("and saved")
        assert seen == [signal.SIGTERM] and pending.stopping is None


def test_usr1_asks_for_a_checkpoint():
    with defer_signals() as pending:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert pending.saving and pending.stopping is None
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("own", [stop, signal.SIG_IGN])
def test_a_programs_own_use_of_usr1_stays(own):
    signal.signal(signal.SIGUSR1, own)
    with defer_signals():
        assert signal.getsignal(signal.SIGUSR1) is own


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with defer_signals() as pending:
        os.kill(os.getpid(), signal.SIGINT)
        assert pending.stopping is None


def test_other_threads_set_no_handlers():
    seen = []

    def work():
        with defer_signals() as pending:
            seen.append((signal.getsignal(signal.SIGTERM), pending.stopping))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(stop, None)]
