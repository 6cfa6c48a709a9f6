# SPDX-License-Identifier: Apache-2.0
"""A run as one HTML page, to read without the machine it was trained on: `ssl_jax report`.

The page loads nothing from outside and has no scripts. `runs.py` reads a workdir, `plots.py` draws
curves, `parts.py` makes the parts of a page, `page.py` joins them.
"""

import threading
from collections.abc import Sequence

from etils import epath

from ssl_jax.report import page, runs
from ssl_jax.run import launch, storage, uploads

FILE = 'report.html'


def write(workdirs: Sequence[epath.PathLike], out: epath.PathLike | None = None) -> epath.PathLike:
    """Writes the page of a run, or a comparison of several; returns its path.

    Args:
      workdirs: of the runs, local or in buckets; each may be unfinished.
      out: the file; default report.html in the first workdir.

    Raises:
      UserError: a workdir holds no run.
    """
    out = out or epath.Path(workdirs[0]) / FILE
    text = page.page(runs.read_all(workdirs))
    uploads.put(out, text.encode())
    if storage.is_remote(out):
        uploads.close()
    return out


def refresh(workdir: epath.PathLike, is_new: bool = False) -> None:
    """`write` for commands that do something else: a failure is a line, and ends nothing.

    In a bucket it is waited for as long as for other small files, `uploads.CLOSE_SECONDS`.

    Args:
      is_new: whether to write a report where there is none.
    """
    if not launch.is_main():
        return

    def attempt():
        try:
            if is_new or storage.exists(f'{workdir}/{FILE}'):
                launch.log(f'report: {write([workdir])}')
        except Exception as error:  # whatever it is, the run matters more
            launch.say(f'{workdir}/{FILE} is not written ({type(error).__name__}: {error}).')

    if not storage.is_remote(workdir):
        return attempt()
    thread = threading.Thread(target=attempt, name='report', daemon=True)
    thread.start()
    thread.join(uploads.CLOSE_SECONDS)
    if thread.is_alive():
        launch.say(f'{workdir}/{FILE} is not written: the bucket does not answer.')
