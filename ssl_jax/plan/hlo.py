# SPDX-License-Identifier: Apache-2.0
"""Text of an optimized HLO module: call graph, trip counts, cycles, collectives.

No jax here: text in, plain numbers out. The text (XLA `hlo_instruction.cc: ToString`, libtpu of
jax 0.10) has one computation per block of lines and one instruction per line,

    %name = shape opcode(%operands), attributes, metadata={op_name="..."}, backend_config={...}

where libtpu's backend_config has `"estimated_cycles"` of most fusions, copies and conversions. It
has no estimate for

  transfers   collectives, and copies between HBM and VMEM that run beside the program
  gathers     counted by the bytes they move, as are operations with the largest int64 as estimate
  kernels     Pallas: libtpu's schedule has the length of one grid step (`chips.compile_program`),
              the kernel's metadata the number of steps
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from ssl_jax.run import errors

COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip
NO_ESTIMATE = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line; `rest` is its text from the operands on."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    def text(self, pattern: str) -> str | None:
        """The first group of a regex in `rest`, None without a match."""
        match = re.search(pattern, self.rest)
        return match.group(1) if match else None

    def number(self, pattern: str) -> int | None:
        """`text` as a number."""
        text = self.text(pattern)
        return None if text is None else int(text)

    @property
    def op_name(self) -> str:
        """Path of name scopes, '' if unknown."""
        return (self.text(r'op_name="((?:[^"\\]|\\.)*)"') or '').replace("\\'", "'")

    @property
    def cycles(self) -> int | None:
        """libtpu's estimate; the largest int64, which stands for none, is None."""
        cycles = self._stated_cycles()
        return None if cycles == NO_ESTIMATE else cycles

    @property
    def is_beyond_estimate(self) -> bool:
        """Whether libtpu says that it has no estimate."""
        return self._stated_cycles() == NO_ESTIMATE

    def _stated_cycles(self):
        return self.number(r'"estimated_cycles":"?(\d+)')

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        return self.opcode == 'custom-call' and 'tpu_custom_call' in self.rest

    def stated(self, key: str) -> int | None:
        """A number in the metadata of a kernel."""
        return self.number(rf'kernel_metadata=\{{[^}}]*"{key}":"(\d+)"')

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute such as calls= refers to."""
        names = self.text(rf'\b{attribute}=(\{{[^}}]*\}}|%[\w.-]+)') or ''
        return re.findall(r'%([\w.-]+)', names)

    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return re.findall(r'%([\w.-]+)', self.rest[: _closing(self.rest, 0)])


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations, {name: {instruction name: instruction}}, and the name of the entry."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def inside(self, fusion: Instruction) -> list[Instruction]:
        """Instructions of a fusion."""
        called = (self.computations.get(name, {}) for name in fusion.called('calls'))
        return [i for instructions in called for i in instructions.values()]


def parse(text: str) -> Module:
    """HLO text -> Module."""
    # Kernel metadata spans several lines.
    text = re.sub(r'kernel_metadata=\{[^}]*\}', lambda m: m.group().replace('\n', ''), text)
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
            if head:
                current = computations[head.group(2)] = {}
                entry = head.group(2) if head.group(1) else entry
        elif line.startswith('}'):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if entry is None:
        raise errors.UserError('no ENTRY computation in this text; give the text of an HLO module.')
    return Module(computations, entry)


def _instruction(line):
    head = re.match(r'\s+(ROOT )?%?([\w.-]+) = ', line)
    if not head:
        return None
    start = head.end()
    stop = _closing(line, start) if line[start] == '(' else line.index(' ', start)
    opcode = re.match(r' ?([\w-]+)(?=\()', line[stop:])
    if not opcode:
        return None
    rest = line[stop + opcode.end() :]
    return Instruction(head.group(2), line[start:stop], opcode.group(1), rest, bool(head.group(1)))


def _closing(text, start):
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == '(') - (text[at] == ')')
        if depth == 0:
            return at + 1
    return len(text)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], float]]:
    """(type, dimensions, bytes): '(bf16[2,3]{1,0}, u8[])' -> [('bf16', (2, 3), 12), ('u8', (), 1)].

    Bytes are without padding.
    """
    matches = re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', shape)
    return [(t, _ints(dims), math.prod(_ints(dims)) * itemsize(t)) for t, dims in matches]


def itemsize(dtype: str) -> float:
    """Bytes of an element: 'bf16' -> 2, 'f8e4m3fn' -> 1, 's4' -> 0.5, 'token' -> 0."""
    bits = re.match(r'[a-z]+?(\d+)', dtype)
    return 1 if dtype == 'pred' else int(bits.group(1)) / 8 if bits else 0


def nbytes(shape: str) -> float:
    """Bytes of all arrays of a shape, without padding."""
    return sum(size for *_, size in arrays(shape))


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """Trips of a while instruction, None if unknown.

    Read from known_trip_count, or from a condition `counter < constant` with a constant start:
    scans of jax count up by one.
    """
    known = loop.number(r'known_trip_count"?:\{"?n"?:"?(\d+)')
    if known is not None:
        return known
    condition = module.computations[loop.called('condition')[0]]
    root = next(i for i in condition.values() if i.is_root)
    if root.opcode != 'compare' or 'direction=LT' not in root.rest:
        return None
    counter, limit = root.operands()
    counter, limit = _source(condition, counter), _constant(condition, limit)
    slot = counter.number(r'index=(\d+)') if counter else None
    caller = module.computations[computation]
    values = caller.get(loop.operands()[0])
    if None in (slot, limit, values) or values.opcode != 'tuple':
        return None
    start = _constant(caller, values.operands()[slot])
    return None if start is None else max(limit - start, 0)


def _source(instructions, name):
    """The instruction behind copies of its value."""
    source = instructions.get(name)
    while source is not None and source.opcode in ('copy', 'bitcast', 'copy-start', 'copy-done'):
        source = instructions.get(source.operands()[0])
    return source


def _constant(instructions, name):
    """The constant behind copies of it, None if the value is computed."""
    source = _source(instructions, name)
    constant = source is not None and source.opcode == 'constant'
    return source.number(r'^\((-?\d+)\)') if constant else None


def walk(
    module: Module, computation: str | None = None, times: int = 1, unknown: list | None = None
) -> Iterator[tuple[str, Instruction, int]]:
    """Yields (computation, instruction, runs per step) of a program.

    Loop bodies run once per trip, of a conditional only the costliest branch runs, and fusions are
    not entered. Loops of unknown length count as one trip; their names are appended to `unknown`.
    """
    computation = computation or module.entry
    for i in module.computations[computation].values():
        yield computation, i, times
        if i.opcode == 'while':
            trips = trip_count(module, computation, i)
            if trips is None and unknown is not None and i.name not in unknown:
                unknown.append(i.name)
            for name in i.called('body') + i.called('condition'):
                yield from walk(module, name, times * (1 if trips is None else trips), unknown)
        elif i.opcode == 'conditional':
            names = i.called('branch_computations')
            names = names or i.called('true_computation') + i.called('false_computation')
            branches = [list(walk(module, name, times, unknown)) for name in names]
            yield from max(branches, key=lambda b: sum((i.cycles or 0) * n for _, i, n in b))
        elif i.opcode in ('call', 'async-start', 'call-start'):  # the last: Ironwood's SparseCores
            for name in i.called('to_apply') or i.called('calls'):
                yield from walk(module, name, times, unknown)


@dataclasses.dataclass(frozen=True)
class Operation:
    """Cycles of one instruction: `cycles` of one run, `times` runs in a step."""

    name: str
    opcode: str
    op_name: str
    cycles: int
    times: int


def operations(
    module: Module,
    unknown: list | None = None,
    kernels: dict | None = None,
    bytes_per_cycle: float = math.inf,
) -> list[Operation]:
    """Operations with an estimate.

    Those that XLA added to a loop get the scope of the loop.

    Args:
      unknown: see `walk`.
      kernels: of `kernel_cycles`. A kernel takes at least the time to move its operands and
        results, or the bytes of its metadata, through HBM.
      bytes_per_cycle: of HBM.
    """
    found, loops, kernels = [], {}, kernels or {}
    for computation, i, times in walk(module, unknown=unknown):
        cycles = i.cycles
        if kernels.get(i.name) is not None:
            moved = i.stated('bytes')
            if moved is None:
                names = module.computations[computation]
                moved = sum(nbytes(names[n].shape) for n in set(i.operands())) + nbytes(i.shape)
            cycles = max(kernels[i.name], round(moved / bytes_per_cycle))
        elif cycles is None and (
            i.is_beyond_estimate or any(j.opcode == 'gather' for j in [i, *module.inside(i)])
        ):
            cycles = round(2 * nbytes(i.shape) / bytes_per_cycle)  # each number is read and written
        if i.opcode == 'while':
            loops[i.called('body')[0]] = i.op_name
        elif cycles is not None:
            op_name = i.op_name or _commonest(j.op_name for j in module.inside(i))
            if '/' not in op_name and computation in loops:
                op_name = f'{loops[computation]}/{i.opcode}'
            opcode = 'kernel' if i.is_kernel else i.opcode
            found.append(Operation(i.name, opcode, op_name, cycles, times))
    return found


def _commonest(names):
    """The most frequent non-empty name, or ''."""
    names = collections.Counter(filter(None, names)) or {'': 1}
    return max(names, key=names.get)


def kernel_cycles(module: Module, bundles: dict, cores: int = 1) -> dict[str, int | None]:
    """{name: cycles of all steps of a kernel, None without a schedule}.

    libtpu compiles equal kernels once: without a schedule, that of a kernel with the same name,
    result and number of steps counts.

    Args:
      bundles: {kernel: cycles of one step of its grid}, of `chips.compile_program`.
      cores: that share the parallel parts of a grid (libtpu's schedules show that they do).
    """
    kernels = {i.name: i for _, i, _ in walk(module) if i.is_kernel}

    def kind(i):
        return re.sub(r'\.\d+$', '', i.name), i.stated('steps'), tuple(arrays(i.shape))

    known = {}
    for name in kernels.keys() & bundles.keys():
        key = kind(kernels[name])
        known[key] = max(bundles[name], known.get(key, 0))
    cycles = {}
    for name, kernel in kernels.items():
        length, steps = bundles.get(name, known.get(kind(kernel))), kernel.stated('steps')
        parts = kernel.stated('parallel') or 1
        scheduled = length is not None and steps is not None
        cycles[name] = length * (steps // parts) * -(-parts // cores) if scheduled else None
    return cycles


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer between chips."""

    # One of COLLECTIVES; an all-reduce of which every chip keeps a part is 'reduce-scatter'.
    kind: str
    groups: tuple[tuple[int, ...], ...]  # device numbers that exchange data; () between slices
    # Bytes that are gathered, reduced or sent; between slices, bytes from a chip to its host,
    # counted once (the hosts do the rest).
    payload: float
    times: int  # runs in a step
    dtypes: tuple[str, ...]  # element types, sorted

    @property
    def wire(self) -> float:
        """Bytes that one chip sends in one run, by the ring algorithms.

        (n - 1)/n of the payload in a group of n; twice that for an all-reduce.
        """
        if not self.groups:
            return self.payload
        n = len(self.groups[0])
        if self.kind in ('collective-permute', 'collective-broadcast'):
            return self.payload if n > 1 else 0
        return (2 if self.kind == 'all-reduce' else 1) * self.payload * (n - 1) / n


def collectives(module: Module, num_devices: int) -> list[Collective]:
    """Collectives of a step.

    libtpu may cut one into pieces that run beside several fusions. The pieces share a channel and
    count once.
    """
    found, seen = [], set()
    for computation, i, times in walk(module):
        fusion = i.opcode == 'fusion'
        scatter = fusion and any('all-reduce-scatter' in name for name in i.called('calls'))
        for x in [i, *(module.inside(i) if fusion else ())]:
            kind = x.opcode.removesuffix('-start')
            far = x.text(r'_xla_megascale_transfer_type="(\w+)"')
            if kind == 'send' and far:
                kind = far.lower().replace('_', '-')
                dtype, _, payload = arrays(x.shape)[0]  # numbers of the transfer follow
                found.append(Collective(kind, (), payload, times, (dtype,)))
                continue
            key = (computation, kind, x.text(r'channel_id=(\d+)') or x.name)
            if kind not in COLLECTIVES or key in seen:
                continue
            seen.add(key)
            payload, groups = _payload(x, kind), replica_groups(x.rest, num_devices)
            if kind == 'reduce-scatter':
                payload *= len(groups[0])  # the shape is of the part that a chip keeps
            if kind == 'all-reduce' and scatter:
                kind = 'reduce-scatter'
            dtypes = tuple(sorted({t for t, *_ in arrays(x.shape)} - {'u32', 's32'})) or ('s32',)
            found.append(Collective(kind, groups, payload, times, dtypes))
    return found


def _payload(instruction, kind):
    """Bytes of the results; a start also lists its operands, except that of an all-reduce."""
    shape = instruction.shape
    if shape.startswith('(('):  # ((operands), (results), ...)
        return nbytes(shape[_closing(shape, 1) :])
    if instruction.opcode.endswith('-start') and kind != 'all-reduce':
        return max((size for *_, size in arrays(shape)), default=0)
    return nbytes(shape)


def replica_groups(text: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Device groups of a collective, in any of the notations of XLA.

    {{0,1},{2,3}}      [2,4]<=[4,2]T(1,0)      mesh['a'=2,'b'=4] {'b'}
    mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}      {}: all in one
    source_target_pairs={{0,1},{1,0}}: pairs that send and receive
    """
    if found := re.search(r'(?:replica_groups|source_target_pairs)=(\{\{.*?\}\})', text):
        return tuple(map(_ints, re.findall(r'\{([\d,]+)\}', found.group(1))))
    ids = np.arange(num_devices)[None]
    if found := re.search(r'replica_groups=\[([\d,]+)\]<=(\[\S+)', text):
        ids = _iota(found.group(2)).reshape(_ints(found.group(1)))
    elif found := re.search(
        r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}', text
    ):
        ids = _mesh_groups(*found.groups())
    return tuple(map(tuple, ids.tolist()))


def _ints(text):
    return tuple(int(d) for d in text.split(',') if d)


def _iota(text):
    """[4,2]T(1,0) -> 0 to 7 in two dimensions, transposed."""
    dims, permutation = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(permutation)) if permutation else ids


def _mesh_groups(axes, device_ids, chosen):
    """Groups (n, size) along some axes of a mesh.

    'a':(m)n is the part n of an axis that has the sizes m, n, rest.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    place = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1), strict=True))
    inside, group_size = [], 1
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        size = int(size or sizes[name])
        rest = sizes[name] // (int(before or 1) * size)
        inside.append(place[name] // rest % size)
        place[name] = place[name] - inside[-1] * rest
        group_size *= size
    if device_ids and device_ids.startswith('['):
        ids = _iota(device_ids).reshape(-1)
    elif device_ids:
        ids = np.array(_ints(device_ids))
    else:
        ids = np.arange(math.prod(sizes.values()))
    order = np.lexsort([*place.values(), *inside][::-1])  # the last key counts most
    return ids[order].reshape(-1, group_size)


def axes_of(groups: tuple, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which a collective exchanges data, e.g. ('data', 'fsdp').

    Args:
      groups: device numbers, counted through the mesh as its shape says (last axis fastest).
      mesh_shape: {axis: size}.
    """
    places = np.stack(np.unravel_index(np.array(groups), tuple(mesh_shape.values())))
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, v in zip(mesh_shape, varies, strict=True) if v)
