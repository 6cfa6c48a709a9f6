# SPDX-License-Identifier: Apache-2.0
"""Compiled programs of a run, kept in a folder: who finds them neither traces nor compiles.

A file is `<program>-<digest of the key>.compiled`: a line of JSON, `{"key", "sha256", "outputs"}`,
then the program as `jax.experimental.serialize_executable` writes it. That is a pickle with machine
code, so the folder has to be trusted as one trusts code; the checksum finds damage, not malice.

The key has all that the program depends on: versions, this package's source, settings of JAX and
XLA, devices and their order, the fields of the config that a step is made from, shapes. It is equal
on the machine that plans and on the chips, so that what `ssl_jax plan --save` compiles without them
can be loaded there.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from ssl_jax import config as config_lib
from ssl_jax import sharding
from ssl_jax import step as step_lib
from ssl_jax.run import bucket, errors, hashing, launch, storage, trees
from ssl_jax.run import clock as clock_lib

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ('ssl_jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
# Fields that change no program; those of `mesh` are in the key as the mesh that they become,
# `kernels` as the forms (`Kept.beside`).
OUTSIDE = (
    'checkpoint.', 'compile_cache', 'data.', 'eval.', 'infer', 'init_from', 'kernels', 'log.',
    'mesh.',
    'method.classes', 'name', 'nonfinite.', 'overrides', 'resume_from', 'total_', 'warmup_',
)  # fmt: skip
# Parts of the names of JAX's settings that change no program. All others count, also those that a
# later release adds: at worst a program is compiled once more.
HARMLESS = (
    'cache', 'collectives_impl', 'coordination', 'cross_host', 'debug_leaked', 'debug_log',
    'distributed', 'dump', 'explain', 'garbage', 'log', 'num_cpu_devices', 'platform',
    'pjrt_client', 'pprint', 'preemption', 'profil', 'proxy', 'recoverability', 'source',
    'thread_guard', 'timeout', 'traceback', 'transfer', 'visible_devices',
)  # fmt: skip
LONGEST_HEAD = 2**18  # bytes of a first line
# Flags that change no program: `plan` dumps schedules, JAX adds a barrier on TPU VMs.
QUIET_FLAGS = ('--xla_jf_dump', '--xla_dump', '--xla_tpu_use_enhanced_launch_barrier')


@dataclasses.dataclass(frozen=True)
class Kept:
    """The folder of the programs of one run."""

    folder: epath.Path | None  # None: nothing is kept
    program: step_lib.Program
    key: dict[str, str]

    @classmethod
    def of(
        cls,
        folder: epath.PathLike | None,
        config: Any,
        program: step_lib.Program,
        num_examples: int | None = None,
        more: dict | None = None,
    ) -> 'Kept':
        """The folder for the programs of a run.

        Args:
          folder: local or gs://; None keeps nothing.
          config: complete.
          program: of the config.
          num_examples: images in the training set; may be unknown without durations in epochs.
          more: what else the program depends on.
        """
        key = {} if folder is None else make_key(config, program, num_examples, more)
        return cls(None if folder is None else epath.Path(folder), program, key)

    def beside(self, **more) -> 'Kept':
        """With more that the programs to come depend on."""
        return dataclasses.replace(self, key=self.key | {k: str(v) for k, v in more.items()})

    def start(self) -> step_lib.Program:
        """The program of the run, with an `init` that comes from the folder."""
        if self.folder is None:
            return self.program
        return dataclasses.replace(self.program, init=lambda: self.get('init')())

    def get(
        self,
        name: str,
        compile: Callable[[Any], jax.stages.Compiled] = jax.stages.Lowered.compile,
    ) -> jax.stages.Compiled:
        """'step' or 'init' of the folder if it is there for this run, else compiled and put there.

        All processes get theirs from the same source. Whatever is wrong with the folder costs a
        line in the log and a compilation.

        Args:
          name: of the program.
          compile: lowered -> compiled.
        """
        if self.folder is None:
            return compile(self.lower(name))
        if sentence := unsafe(self.program.mesh):
            launch.log(f'compiled  {name} is neither loaded nor kept: {sentence}')
            return compile(self.lower(name))
        started = time.monotonic()
        try:
            loaded, why = self.load(name), 'another process cannot load it'
        except errors.UserError as error:
            loaded, why = None, str(error)
        if not launch.any_says(loaded is None):
            launch.log(f'compiled  {name} loaded in {time.monotonic() - started:.1f} s')
            return loaded
        launch.log(f'compiled  {name} is compiled now: {why}')
        with without_cache():
            made = compile(self.lower(name))
        if launch.is_main():
            try:
                launch.log(f'compiled  {name} kept as {self.save(name, made)}')
            except errors.UserError as error:
                launch.log(f'compiled  {error}')
        return made

    def lower(self, name: str) -> jax.stages.Lowered:
        """The program `name`, traced."""
        with jax.set_mesh(self.program.mesh):
            if name == 'init':
                return self.program.init.lower()
            return self.program.step.lower(self.program.abstract, self.program.batch)

    def save(self, name: str, compiled: jax.stages.Compiled) -> epath.Path:
        """Writes a program and returns its file.

        Args:
          name: of the program.
          compiled: made under `without_cache`.

        Raises:
          UserError: it cannot be written.
        """
        path = self._path(name)
        try:
            payload, inputs, outputs = serialize_executable.serialize(compiled)
            found = {'outputs': [*compiled.out_info[1]] if name == 'step' else []}
            if (inputs, outputs) != self._trees(name, found['outputs']):
                raise ValueError('its arguments have another structure')
            head = {'key': self.key, 'sha256': hashlib.sha256(payload).hexdigest(), **found}
            storage.atomic_write(path, json.dumps(head).encode() + b'\n' + payload)
        except Exception as error:  # of JAX, of the compiler, of the disk
            raise errors.UserError(
                f'{name} cannot be kept in {self.folder}: {_in_a_line(error)}'
            ) from error
        return path

    def load(self, name: str) -> jax.stages.Compiled:
        """Reads a program.

        Raises:
          UserError: it is not there, damaged, or cannot be loaded.
        """
        path = self._path(name)
        try:
            try:
                head, _, payload = storage.read(path).partition(b'\n')
            except FileNotFoundError:
                raise errors.UserError(self._nearest(name)) from None
            head = _head(head)
            if head.get('key') != self.key:
                raise errors.UserError(f'{path} has another key in its first line')
            if hashlib.sha256(payload).hexdigest() != head['sha256']:
                raise errors.UserError(f'{path} is damaged')
            inputs, outputs = self._trees(name, head['outputs'])
            devices = [*self.program.mesh.devices.flat]
            return serialize_executable.deserialize_and_load(
                payload, inputs, outputs, devices[0].client, devices
            )
        except errors.UserError:
            raise
        except Exception as error:  # of JAX, of the compiler, of the disk
            raise errors.UserError(f'{path} cannot be loaded: {_in_a_line(error)}') from error

    def _path(self, name):
        return self.folder / f'{name}-{hashing.digest(json.dumps(self.key))}.compiled'

    def _trees(self, name, outputs):
        """Structures of arguments and results, rebuilt so that none has to be unpickled."""
        p = self.program
        arguments, results = ((p.abstract, p.batch), (p.abstract, dict.fromkeys(outputs, 0)))
        if name == 'init':
            arguments, results = (), p.abstract
        return jax.tree.structure((arguments, {})), jax.tree.structure(results)

    def _nearest(self, name):
        """A sentence on the kept program that is most like the one that is missing."""
        found = []
        for path in _files(self.folder, f'{name}-'):
            other = _head(_first_line(path)).get('key', {})
            found.append([k for k in {**self.key, **other} if self.key.get(k) != other.get(k)])
            found[-1] = (len(found[-1]), *((k, other.get(k)) for k in found[-1][:1]))
        if not found:
            return f'{self.folder} has none yet'
        count, (key, value) = min(found, key=lambda x: x[0])
        more = f', and {count - 1} more differ' if count > 1 else ''
        return (
            f'{self.folder} has one with {key} {value or "not set"}, here it is '
            f'{self.key.get(key) or "not set"}{more}'
        )


def make_key(
    config: Any, program: step_lib.Program, num_examples: int | None = None, more: Any = None
) -> dict[str, str]:
    """{name: value} of all that a program depends on, in the order in which differences are told.

    For the arguments see `Kept.of`.
    """
    devices = [*program.mesh.devices.flat]
    clock = clock_lib.Clock.of(config, num_examples)
    key = {f'{name} version': _version(name) for name in PACKAGES}
    key['source of ssl_jax'] = source()
    key |= _hardware(devices)
    key['XLA_FLAGS'] = _flags('XLA_FLAGS')
    settings = jax.config.values
    key |= {k: settings[k] for k in sorted(settings) if not any(x in k for x in HARMLESS)}
    key['mesh'] = dict(program.mesh.shape)
    key['compiler options'] = sharding.compiler_options(program.mesh, config.xla)
    fields = config_lib.flatten(config)
    key |= {k: fields[k] for k in sorted(fields) if not k.startswith(OUTSIDE)}
    key |= {'total steps': clock.total, 'warm-up steps': clock.warmup}
    key['images'] = num_examples if in_epochs(config) else None
    key |= more or {}
    arrays = trees.named((program.abstract, program.batch))
    shapes = (f'{k} {x.dtype}{x.shape} {x.sharding.spec}' for k, x in arrays.items())
    key['shapes of state and batch'] = hashing.digest(*shapes)
    return {k: str(v) for k, v in key.items()}


def in_epochs(config: Any) -> list[str]:
    """Durations 'a.b=value' in epochs that a program contains in steps."""
    durations = {k: v for k, v in config_lib.flatten(config).items() if k.endswith('_epochs')}
    outside = tuple(x for x in OUTSIDE if x not in ('total_', 'warmup_'))
    return [f'{k}={v}' for k, v in durations.items() if v is not None and not k.startswith(outside)]


def unsafe(mesh: jax.sharding.Mesh) -> str:
    """Why no program may be loaded for these devices; '' if it may."""
    # See `launch.enable_compile_cache`.
    hosts = [d.process_index for d in mesh.devices.flat]
    if len(hosts) > len(set(hosts)) and mesh.devices.flat[0].platform == 'cpu':
        return 'one for several CPU devices of a process may hang when it is read from a disk.'
    return ''


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """JAX's own cache of compilations is neither read nor written.

    What comes from there loses its machine code when it is written once more (CPU, jax 0.10.2).
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # JAX looks at the setting once
    try:
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', before)
        compilation_cache.reset_cache()


@functools.cache
def source() -> str:
    """Digest of the source of this package, without its recipes."""
    files = sorted(p for p in PACKAGE.rglob('*.py') if p.parent.name != 'configs')
    return hashing.digest(
        *(part for p in files for part in (p.relative_to(PACKAGE).as_posix(), p.read_bytes()))
    )


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware(devices):
    """Compiler and devices, the same for a topology of chips and for the chips."""
    first = devices[0]
    # A topology of several slices has the prefix.
    compiler = ' '.join(first.client.platform_version.replace('megascale+', '').split())
    key = {'compiler': compiler, 'devices': f'{len(devices)} x {first.device_kind}'}
    if first.platform == 'cpu':
        key['processor'] = _processor()
    if first.platform == 'tpu':
        key['LIBTPU_INIT_ARGS'] = _flags('LIBTPU_INIT_ARGS')
        names = ('id', 'coords', 'core_on_chip', 'slice_index')
    else:  # hosts of a pod may be cut in another way than those of its topology
        names = ('id', 'process_index')
    places = [[getattr(d, name, None) for name in names] for d in devices]
    if len({p[-1] for p in places}) == 1 and first.platform == 'tpu':
        places = [p[:-1] for p in places]  # one slice is numbered 0 or not at all
    key['places of the devices'] = hashing.digest(places)
    return key


def _processor():
    """What XLA compiles for on a CPU: its instructions, and the number of cores."""
    lines = storage.read_lines('/proc/cpuinfo')
    names = ('model name', 'flags', 'CPU implementer', 'CPU part', 'Features')
    found = dict.fromkeys(line for line in lines if line.split('\t')[0].strip() in names)
    name = next((x.partition(':')[2].strip() for x in found), platform.processor())
    return f'{launch.cores()} cores of {platform.machine()} {name} ({hashing.digest(*found)})'


def _flags(name):
    """Flags of a variable of the environment, sorted."""
    flags = os.environ.get(name, '').split()
    return ' '.join(sorted(f for f in flags if not f.startswith(QUIET_FLAGS)))


def _files(folder, prefix):
    """Kept programs of a folder; none if it is absent."""
    if storage.is_remote(folder):
        names = bucket.names(folder)
    else:
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [folder / n for n in names if n.startswith(prefix) and n.endswith('.compiled')]


def _first_line(path):
    if storage.is_remote(path):
        return bucket.read(path, LONGEST_HEAD).partition(b'\n')[0]
    with open(path, 'rb') as file:
        return file.readline(LONGEST_HEAD)


def _head(line):
    """The first line of a file; {} if it is not one of ours."""
    try:
        head = json.loads(line)
    except ValueError:
        return {}
    return head if isinstance(head, dict) else {}


def _in_a_line(error):
    return f'{type(error).__name__} {error}'.strip().splitlines()[0]
