# SPDX-License-Identifier: Apache-2.0
"""Tests for ssl_jax.run.threads."""

import signal
import threading

import pytest

from ssl_jax.run import threads


@pytest.mark.parametrize('count', [1, 2, 5, 50])
def test_results_come_in_order_and_few_wait(count):
    taken, begun = [], []

    def call(x):
        begun.append(x)
        return 2 * x

    for result in threads.at_once(call, range(20), count):
        taken.append(result)
        assert len(begun) <= len(taken) + count
    assert taken == list(range(0, 40, 2))
    assert list(threads.at_once(call, [], count)) == []


def test_calls_run_at_once():
    together = threading.Barrier(4, timeout=20)
    list(threads.at_once(lambda x: together.wait(), range(8), 4))


@pytest.mark.parametrize('count', [1, 3])
def test_an_error_is_raised_in_its_turn_and_ends_the_rest(count):
    begun = []

    def call(x):
        begun.append(x)
        if x == 2:
            raise KeyError(x)
        return x

    found = threads.at_once(call, range(1000), count)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(KeyError):
        next(found)
    assert len(begun) <= 2 + 2 * count


def test_a_call_that_hangs_holds_up_no_signal():
    forever = threading.Event()
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        list(threads.at_once(lambda x: forever.wait(), range(3), 2))
    forever.set()
