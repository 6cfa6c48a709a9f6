# SPDX-License-Identifier: Apache-2.0
"""Reads the text of an optimized HLO module: call graph, trip counts, cycles, collectives.

No jax here: text in, plain numbers out.  What the text has (XLA `hlo_instruction.cc: ToString`,
libtpu of jax 0.10): one computation per block of lines, one instruction per line,

    %name = shape opcode(%operands), attributes, metadata={op_name="..."}, backend_config={...}

where libtpu's backend_config holds `"estimated_cycles"` of most fusions, copies and conversions.
Transfers (copies between HBM and VMEM that run beside the program, collectives) have none, nor have
gathers, which are counted as what they move, nor kernels of our own (Pallas): of those libtpu's
schedules tell the length of one step of their grid (`chips.compile_program`), and they say
themselves how many steps there are.
"""

import collections
import dataclasses
import math
import re

import numpy as np

COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip
BYTES = {'pred': 1, 'token': 0, 'opaque': 0, 's4': 0.5, 'u4': 0.5}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `shape` and `rest` (from the operands on) are its text."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def op_name(self):
        """The path of name scopes that made it, '' if unknown."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found.group(1).replace("\\'", "'") if found else ''

    @property
    def cycles(self):
        """libtpu's estimate, None where it has none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.rest)
        return int(found.group(1)) if found else None

    @property
    def is_kernel(self):
        """Whether it is a kernel of our own, not of XLA."""
        return self.opcode == 'custom-call' and 'tpu_custom_call' in self.rest

    def said(self, key):
        """A whole number that a kernel says of itself (its metadata), None if it does not."""
        found = re.search(rf'kernel_metadata=\{{[^}}]*"{key}":"(\d+)"', self.rest)
        return int(found.group(1)) if found else None

    def called(self, attribute):
        """Names of the computations that an attribute such as calls= refers to."""
        found = re.search(rf'\b{attribute}=(\{{[^}}]*\}}|%[\w.-]+)', self.rest)
        return re.findall(r'%([\w.-]+)', found.group(1)) if found else []

    def operands(self):
        """Names of the operands, in order."""
        return re.findall(r'%([\w.-]+)', self.rest[: _closing(self.rest, 0)])


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: name -> list of Instructions.  entry: the name of the first to run."""

    computations: dict
    entry: str

    def by_name(self, computation):
        return {i.name: i for i in self.computations[computation]}


def parse(text):
    """HLO text -> Module."""
    # What a kernel says of itself is printed over several lines.
    text = re.sub(r'kernel_metadata=\{[^}]*\}', lambda m: m.group().replace('\n', ''), text)
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
            if head:
                current = head.group(2)
                computations[current] = []
                entry = current if head.group(1) else entry
        elif line.startswith('}'):
            current = None
        else:
            instruction = _instruction(line)
            if instruction:
                computations[current].append(instruction)
    if entry is None:
        raise ValueError('no ENTRY computation in this text; give the text of an HLO module.')
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


def arrays(shape):
    """'(bf16[2,3]{1,0}, f32[])' -> [('bf16', (2, 3)), ('f32', ())]."""
    found = re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', shape)
    return [(dtype, tuple(int(d) for d in dims.split(',') if d)) for dtype, dims in found]


def itemsize(dtype):
    """Bytes of one element of an HLO type: 'bf16' -> 2, 'f8e4m3fn' -> 1, 'c64' -> 8."""
    if dtype in BYTES:
        return BYTES[dtype]
    bits = re.match(r'[a-z]+?(\d+)', dtype)
    return int(bits.group(1)) / 8 if bits else 0


def nbytes(shape):
    """Bytes of all arrays of a shape, without padding."""
    return sum(math.prod(dims) * itemsize(dtype) for dtype, dims in arrays(shape))


def trip_count(module, computation, loop):
    """How often a while instruction runs its body, None where that cannot be read.

    From known_trip_count, or from a condition `counter < constant` with a constant start; jax's
    scans count up by one.
    """
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
    if known:
        return int(known.group(1))
    instructions = module.by_name(loop.called('condition')[0])
    root = next(i for i in instructions.values() if i.is_root)
    sides = root.operands()
    if root.opcode != 'compare' or 'direction=LT' not in root.rest or len(sides) != 2:
        return None
    counter, limit = (_source(instructions, name) for name in sides)
    if limit is None or limit.opcode != 'constant' or counter is None:
        return None
    slot = re.search(r'index=(\d+)', counter.rest)
    start = _start(module.by_name(computation), loop, int(slot.group(1))) if slot else None
    return None if start is None else max(_constant(limit) - start, 0)


def _start(instructions, loop, slot):
    """The constant that a loop's counter starts from."""
    values = instructions.get(loop.operands()[0])
    if values is None or values.opcode != 'tuple':
        return None
    first = _source(instructions, values.operands()[slot])
    return _constant(first) if first is not None and first.opcode == 'constant' else None


def _source(instructions, name):
    """Follows copies to the instruction that made a value."""
    found = instructions.get(name)
    while found is not None and found.opcode in ('copy', 'bitcast', 'copy-start', 'copy-done'):
        found = instructions.get(found.operands()[0])
    return found


def _constant(instruction):
    return int(re.match(r'\((-?\d+)\)', instruction.rest).group(1))


def walk(module, computation=None, times=1, unknown=None):
    """Yields (computation, instruction, times) for all that runs, `times` per call of the module.

    Bodies of loops count their trips; of a conditional's branches the costliest runs; what is
    inside a fusion is not visited.  Names of loops with unknown trip counts, taken as one trip, are
    appended to the list `unknown`.
    """
    computation = computation or module.entry
    for i in module.computations[computation]:
        yield computation, i, times
        if i.opcode == 'while':
            trips = trip_count(module, computation, i)
            if trips is None:
                trips = 1
                if unknown is not None and i.name not in unknown:
                    unknown.append(i.name)
            for name in i.called('body') + i.called('condition'):
                yield from walk(module, name, times * trips, unknown)
        elif i.opcode == 'conditional':
            names = i.called('branch_computations')
            names = names or i.called('true_computation') + i.called('false_computation')
            branches = [list(walk(module, name, times, unknown)) for name in names]
            yield from max(branches, key=lambda b: sum((i.cycles or 0) * n for _, i, n in b))
        elif i.opcode in ('call', 'async-start'):
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


def operations(module, unknown=None, kernels=None, bytes_per_cycle=math.inf):
    """All Operations with an estimate; those that XLA made itself have the scope of their loop.

    kernels: `kernel_cycles`.  A kernel takes these, or the time in which its operands and results,
    or the bytes that it states, pass HBM at bytes_per_cycle, if that is longer.
    """
    found, loops, names, kernels = [], {}, {}, kernels or {}
    for computation, i, times in walk(module, unknown=unknown):
        cycles = i.cycles
        if kernels.get(i.name) is not None:
            if computation not in names:
                names[computation] = module.by_name(computation)
            moved = i.said('bytes')
            if moved is None:
                operands = [names[computation][name].shape for name in set(i.operands())]
                moved = sum(map(nbytes, [*operands, i.shape]))
            cycles = max(kernels[i.name], round(moved / bytes_per_cycle))
        elif cycles is None and _gathers(module, i):  # no estimate: each number is read and written
            cycles = round(2 * nbytes(i.shape) / bytes_per_cycle)
        if i.opcode == 'while':
            loops[i.called('body')[0]] = i.op_name
        elif cycles is not None:
            op_name = i.op_name or _inner_name(module, i)
            if '/' not in op_name and computation in loops:
                op_name = f'{loops[computation]}/{i.opcode}'
            opcode = 'kernel' if i.is_kernel else i.opcode
            found.append(Operation(i.name, opcode, op_name, cycles, times))
    return found


def kernel_cycles(module, bundles, cores=1):
    """name -> cycles of all steps of each kernel, None where there is no schedule to tell them.

    bundles: cycles of one step of its grid, by the name of a kernel (`chips.compile_program`).
    cores: that share the parallel parts of a grid (which libtpu's schedules show them to do).
    libtpu compiles equal kernels once: one without a schedule takes that of its name, result and
    number of steps.
    """
    kernels = {i.name: i for _, i, _ in walk(module) if i.is_kernel}
    known = {}
    for name in kernels.keys() & bundles.keys():
        known[_kind(kernels[name])] = max(bundles[name], known.get(_kind(kernels[name]), 0))
    found = {}
    for name, kernel in kernels.items():
        length, steps = bundles.get(name, known.get(_kind(kernel))), _kind(kernel)[2]
        parts = kernel.said('parallel') or 1
        if length is None or steps is None:
            found[name] = None
        else:
            found[name] = length * (steps // parts) * -(-parts // cores)
    return found


def _kind(kernel):
    """(name without its number, arrays of the result, steps of its grid)."""
    name = re.sub(r'\.\d+$', '', kernel.name)
    return name, tuple(arrays(kernel.shape)), kernel.said('steps')


def _gathers(module, i):
    """Whether it is a gather, or a fusion with one."""
    inner = (module.computations.get(c, ()) for c in i.called('calls'))
    return i.opcode == 'gather' or any(j.opcode == 'gather' for c in inner for j in c)


def _inner_name(module, fusion):
    """The commonest name scope inside a fusion that has none itself."""
    names = collections.Counter(
        inner.op_name
        for computation in fusion.called('calls')
        for inner in module.computations.get(computation, ())
        if inner.op_name
    )
    return names.most_common(1)[0][0] if names else ''


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer between chips.

    Attributes:
      kind: one of COLLECTIVES; an all-reduce of which every chip keeps a part is 'reduce-scatter'.
      groups: tuple of tuples of device numbers that talk to each other; () between slices.
      payload: bytes of the whole array (or arrays) that is gathered, reduced or sent; between
        slices, of what a chip hands to its host, once (the hosts do the rest).
      op_name: the name scope.  times: runs in a step.
      dtypes: the element types, sorted.
    """

    kind: str
    groups: tuple
    payload: float
    op_name: str
    times: int
    dtypes: tuple

    @property
    def wire(self):
        """Bytes that one chip sends in one run, by the ring algorithms.

        (n - 1)/n of the payload in a group of n; twice that for an all-reduce.
        """
        if not self.groups:
            return self.payload
        n = len(self.groups[0])
        if self.kind in ('collective-permute', 'collective-broadcast'):
            return self.payload if n > 1 else 0
        return (2 if self.kind == 'all-reduce' else 1) * self.payload * (n - 1) / n


def collectives(module, num_devices):
    """All Collectives of a step.

    One that libtpu cuts into pieces, to run beside several fusions, is found in each of these: the
    pieces share a channel and count once.
    """
    found, seen = [], set()
    for computation, i, times in walk(module):
        inside = i.called('calls') if i.opcode == 'fusion' else []
        inner = [x for name in inside for x in module.computations.get(name, ())]
        scatter = any('all-reduce-scatter' in name for name in inside)
        for x in [i, *inner]:
            kind = x.opcode.removesuffix('-start')
            far = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.rest)
            if kind == 'send' and far:
                kind = far.group(1).lower().replace('_', '-')
                dtype, dims = arrays(x.shape)[0]  # then come numbers of the transfer
                payload = math.prod(dims) * itemsize(dtype)
                found.append(Collective(kind, (), payload, x.op_name, times, (dtype,)))
                continue
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r'channel_id=(\d+)', x.rest)
            key = (computation, kind, channel.group(1) if channel else x.name)
            if key in seen:
                continue
            seen.add(key)
            payload = _payload(x, kind)
            groups = replica_groups(x.rest, num_devices)
            if kind == 'reduce-scatter':
                payload *= len(groups[0])  # the shape is that of the part a chip keeps
            if kind == 'all-reduce' and scatter:
                kind = 'reduce-scatter'
            dtypes = tuple(sorted({d for d, _ in arrays(x.shape)} - {'u32', 's32'})) or ('s32',)
            op_name = x.op_name or i.op_name
            found.append(Collective(kind, groups, payload, op_name, times, dtypes))
    return found


def _payload(instruction, kind):
    """Bytes of the results; a start, except of an all-reduce, has its operands beside them."""
    shape = instruction.shape
    if shape.startswith('(('):  # ((operands), (results), ...)
        return nbytes(shape[_closing(shape, 1) :])
    if instruction.opcode.endswith('-start') and kind != 'all-reduce':
        return max((math.prod(d) * itemsize(t) for t, d in arrays(shape)), default=0)
    return nbytes(shape)


def replica_groups(text, num_devices):
    """The device groups of a collective, from any of the ways XLA writes them.

    {{0,1},{2,3}}      [2,4]<=[4,2]T(1,0)      mesh['a'=2,'b'=4] {'b'}
    mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}      {}: all in one
    source_target_pairs={{0,1},{1,0}}: pairs that send and receive
    """
    pairs = re.search(r'source_target_pairs=(\{\{.*?\}\})', text)
    listed = re.search(r'replica_groups=(\{\{.*?\}\})', text) or pairs
    if listed:
        groups = re.findall(r'\{([\d,]+)\}', listed.group(1))
        return tuple(tuple(int(d) for d in g.split(',')) for g in groups)
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    if iota:
        ids = _iota(iota.group(2), iota.group(3)).reshape(_ints(iota.group(1)))
        return tuple(map(tuple, ids.tolist()))
    mesh = re.search(
        r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}', text
    )
    if mesh:
        return _mesh_groups(*mesh.groups())
    return (tuple(range(num_devices)),)


def _ints(text):
    return tuple(int(d) for d in text.split(',') if d)


def _iota(dims, permutation):
    dims = _ints(dims)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_ints(permutation)) if permutation else ids


def _mesh_groups(axes, device_ids, chosen):
    """Groups along some axes of a mesh; a part of an axis is written 'a':(m)n, sizes m, n, rest."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = {name: [size] for name, size in sizes.items()}
    wanted = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        if before:
            rest = sizes[name] // (int(before) * int(size))
            parts[name], at = [int(before), int(size), rest], 1
        else:
            at = 0
        wanted.append((name, at))
    shape, place = [], {}
    for name in sizes:
        for at, size in enumerate(parts[name]):
            place[name, at] = len(shape)
            shape.append(size)
    found = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', device_ids or '')
    if found:
        ids = _iota(*found.groups())
    elif device_ids:
        ids = np.array([int(d) for d in re.findall(r'\d+', device_ids)])
    else:
        ids = np.arange(math.prod(shape))
    ids = ids.reshape(shape)
    last = [place[w] for w in wanted]
    order = [d for d in range(len(shape)) if d not in last] + last
    size = math.prod(shape[d] for d in last)
    return tuple(map(tuple, ids.transpose(order).reshape(-1, size).tolist()))


def axes_of(groups, mesh_shape):
    """The mesh axes along which a collective talks, e.g. ('data', 'fsdp').

    Args:
      groups: device numbers, counted through the mesh as its shape says (last axis fastest).
      mesh_shape: dict axis -> size.
    """
    names, sizes = list(mesh_shape), tuple(mesh_shape.values())
    varies = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))
        varies |= {n for n, row in zip(names, places) if len(set(row.tolist())) > 1}
    return tuple(n for n in names if n in varies)
