# SPDX-License-Identifier: Apache-2.0
"""Lines of progress count the images of all threads and say how long the rest takes."""

import re
import threading

from ssl_jax.run import progress


def test_lines_count_every_image_and_none_comes_at_the_end(monkeypatch):
    monkeypatch.setattr(progress, 'SECONDS', 0)
    said = []
    done = progress.Progress(400, said.append)
    threads = [threading.Thread(target=lambda: [done.add() for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(line.split()[0]) for line in said] == list(range(1, 400))
    assert all(re.fullmatch(r'\d+ of 400 images, [\d,]+/s, \d+:\d\d left', line) for line in said)


def test_a_short_pass_says_nothing():
    said = []
    done = progress.Progress(10, said.append)
    for _ in range(9):
        done.add()
    assert not said
