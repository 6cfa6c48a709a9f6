# SPDX-License-Identifier: Apache-2.0
"""Verdicts of a run: measured at its first start, kept with it and beside the compile cache.

A file has {device, versions: {call: [verdict of each form]}}. A run follows its own file,
WORKDIR/kernels.json, as long as device, versions and the source of the forms are those of the file,
so that a restart has the same bits wherever the cache is; then that of the cache. What neither has
is measured by process 0, and all processes follow it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable

import jax
from etils import epath

from ssl_jax import fields
from ssl_jax.kernels import choice, forms
from ssl_jax.kernels.choice import Verdict
from ssl_jax.run import errors, launch, peers, storage

FILE = 'kernels.json'
ENDED = 'the process ended while it was measured'  # by a crash, a halted chip, or by hand


def for_run(
    mode: str,
    step: Callable,
    args: tuple,
    workdir: epath.PathLike,
    *,
    keep: bool,
    device: jax.Device | None = None,
    platform: str | None = None,
    measure: Callable = choice.measure,
    log: Callable = launch.log,
) -> tuple[dict[str, str] | str, str]:
    """The forms of a run; under the mesh of the run. All processes call it.

    Args:
        mode: `kernels` of the config, 'auto', 'on' or 'off'.
        step: jitted; what it calls with `args` is measured.
        args: abstract arguments of `step`.
        workdir: of the run.
        keep: whether verdicts are also kept beside the compile cache.
        device: that measures, None: the first of this process.
        platform: of the lowering, None: that of `device`.
        measure: see `choice.measure`.
        log: takes lines.

    Returns:
        Arguments of `forms.using`.
    """
    device = device or jax.local_devices()[0]
    platform = platform or forms.PLATFORMS.get(device.platform)
    if platform is None or mode == 'off':
        return 'off', 'tpu'
    if mode == 'on':
        log('kernels   on: hand-written forms wherever they fit, not compared with those of XLA')
        return 'on', platform
    chosen = {}
    if launch.is_main():
        with forms.recording(platform) as calls:
            # Not the jitted step itself: it would keep this trace, which has XLA's forms.
            jax.eval_shape(lambda *args: step.__wrapped__(*args), *args)
        folder = epath.Path(launch.cache_folder()) if keep else None
        peers.at('measuring forms of operations')
        run = epath.Path(workdir) / FILE

        def measured(call):
            return measure([call], device=device, platform=platform, log=log)

        decided = _decide(calls, platform, _where(device), run, folder, measured, log)
        chosen = {v.call.key: v.form for v in decided if v.used}
        log(_summary(decided, calls))
    return launch.consult(chosen, lambda found: found[0]), platform


def _decide(calls, platform, where, run, folder, measured, log):
    """Verdicts of all calls, from the file `run`, from that in `folder`, or measured."""
    kept = {path: _read(path, log) for path in ([run, folder / FILE] if folder else [run])}
    if kept[run] and where not in kept[run]:
        log(f'kernels   {run} is of another device, version or source: chosen anew')
    known = {}
    for path, found in kept.items():
        here = {c.key: found.get(where, {}).get(c.key) for c in calls if c.key not in known}
        here = {key: verdicts for key, verdicts in here.items() if verdicts}
        known |= here
        if here:
            log(f'kernels   {len(here)} of {len(calls)} verdicts of {path}')
        for v in (v for verdicts in here.values() for v in verdicts if v.reason == ENDED):
            log(f'kernels   {choice.words(v.call)}: {v.form} is not used, {ENDED} ({path})')
    own, new = dict(kept[run].get(where, {})), []
    if missing := [c for c in calls if c.key not in known]:
        log(f"kernels   comparing {len(missing)} calls with XLA's forms, some seconds each")
    for call in missing:
        names = forms.FORMS[call.op][platform]
        pending = {call.key: [Verdict(call, name, False, ENDED) for name in names]}
        _write(run, {where: {**own, **pending}}, log)
        try:
            found = measured(call)
        except BaseException:  # a signal, say; no crash
            _write(run, {where: own}, log)
            raise
        known[call.key] = own[call.key] = found
        new += found
    for line in choice.table(new).splitlines() if new else ():
        log(line)
    wanted = {where: {**own, **known}}
    if calls and (new or wanted != kept[run]):
        _write(run, wanted, log)
    if folder and (added := known.keys() - kept[folder / FILE].get(where, {}).keys()):
        others = _read(folder / FILE)  # again: another run may have written meanwhile
        here = {**others.get(where, {}), **{key: known[key] for key in added}}
        _write(folder / FILE, {**others, where: here}, log)
    return [v for c in calls for v in known[c.key]]


def _summary(verdicts, calls):
    if not calls:
        return "kernels   no hand-written form fits this step; XLA's are used"
    count = sum(v.used for v in verdicts)
    return f'kernels   {count} of {len(calls)} calls of this step in a hand-written form'


def _where(device):
    """Device, versions and source that verdicts depend on."""
    folder, digest = pathlib.Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob('*.py')):
        digest.update(path.read_bytes())
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib')]
    runtime = ' '.join(getattr(device.client, 'platform_version', '').split())
    return ', '.join([device.device_kind, *versions, runtime, f'source {digest.hexdigest()[:12]}'])


def _read(path, log=None):
    """{where: {key: [Verdict]}} of a file, {} without one; a file that is none costs a line."""
    try:
        stored = json.loads(path.read_text())
        return {
            where: {key: [_verdict(key, v) for v in found] for key, found in calls.items()}
            for where, calls in stored.items()
        }
    except FileNotFoundError:
        return {}
    except errors.UserError:  # a bucket that does not answer: the bits of the run depend on it
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if log:
            log(f'kernels   {path} cannot be read ({type(error).__name__}): measured anew')
        return {}


def _verdict(key, values):
    found = Verdict(forms.Call(*fields.tuples(json.loads(key))), **values)
    for name, kind in Verdict.__annotations__.items():
        if name != 'call' and not isinstance(getattr(found, name), kind):
            raise TypeError(f'{name} of a verdict is {getattr(found, name)!r}')
    return found


def _write(path, verdicts, log):
    def plain(v):
        values = dataclasses.asdict(v)
        del values['call']
        return values

    stored = {
        where: {key: [plain(v) for v in found] for key, found in calls.items()}
        for where, calls in verdicts.items()
    }
    try:
        storage.atomic_write(path, json.dumps(stored, indent=1) + '\n')
    except (OSError, errors.UserError) as error:
        log(f'kernels   {path} cannot be written: {error}')
