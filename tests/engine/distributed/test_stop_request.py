"""Stop requests by signals and by threads."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from engine.distributed.watchdog import StopRequest
from tests.processes import ROOT

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def default_signal_handlers():
    """The default signal handlers. Tests may be started with some signals ignored, which stay ignored otherwise."""
    handlers = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_a_wait_and_handlers_are_restored(number):
    before = [signal.getsignal(each) for each in NUMBERS]
    stop = StopRequest()
    with stop.listening():
        assert not stop.wait(0)
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        assert stop.wait(600) and stop.number == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(0) and stop.number == number, "the first one counts"
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_a_thread_can_request_a_stop_and_a_wait_times_out():
    stop = StopRequest()
    assert not stop.wait(0.12)
    threading.Timer(0.1, stop.ask, (signal.SIGTERM,)).start()
    assert stop.wait(600) and stop.number == signal.SIGTERM
    stop.ask(signal.SIGINT)
    assert stop.number == signal.SIGTERM


def test_outside_the_main_thread_handlers_are_unchanged():
    before, seen = [signal.getsignal(each) for each in NUMBERS], []

    def listen():
        with StopRequest().listening():
            seen.append([signal.getsignal(each) for each in NUMBERS])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_second_sigint_ends_the_process_at_once():
    script = """
import time
from engine.distributed.watchdog import StopRequest
stop = StopRequest()
with stop.listening():
    print("listening", flush=True)
    stop.wait(600)
    print(stop.number, flush=True)
    while True:
        time.sleep(1)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"{signal.SIGINT.value}\n"
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT
    finally:
        process.kill()
