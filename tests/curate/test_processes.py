# SPDX-License-Identifier: Apache-2.0
"""Two processes with two devices each curate together."""

import numpy as np
import pyarrow.parquet as pq
import pytest

import planted
import processes
from ssl_jax.curate import command, output

WORDS = ['dedup.threshold=0.97', 'against.threshold=0.97', 'retrieve.clusters=8']
WORDS += ['balance.target=40', 'balance.clusters=(20,4)', 'retrieve.min_queries=1']
CODE = """
    from ssl_jax.curate import command, output
    from ssl_jax.run import errors, launch
    launch.initialize_distributed()
    output.draw = lambda work, state: None
    with errors.in_a_sentence('curate'):
        command.curate({pool!r}, {out!r}, queries=[{pool!r}], against=[{test!r}],
            embeddings={files!r}, words={words!r})
"""


@pytest.mark.slow
def test_two_processes_write_the_manifest_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(output, 'draw', lambda work, state: None)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 24))
    x[250:] = x[:50] + 0.01 * rng.normal(size=(50, 24))
    test = x[:10] + 0.01 * rng.normal(size=(10, 24))
    images = [planted.encoded(np.full((4, 4, 3), i % 250, np.uint8)) for i in range(300)]
    sets = dict(
        pool=planted.write_set(tmp_path / 'pool.parquet', images),
        test=planted.write_set(tmp_path / 'test.parquet', images[:10]),
    )
    pool, test = (
        planted.write_vectors(tmp_path / f'{k}.vectors.parquet', v)
        for k, v in (('pool', x), ('test', test))
    )
    files, out = [pool, pool, test], str(tmp_path / 'two')
    code = CODE.format(out=out, files=files, words=WORDS, **sets)
    ended = [processes.finish(p) for p in processes.twice(code, 2)]
    assert [rc for rc, _ in ended] == [0, 0], ended
    one = command.curate(
        sets['pool'], str(tmp_path / 'one'), queries=[sets['pool']], against=[sets['test']],
        embeddings=files, words=WORDS,
    )  # fmt: skip
    for name in ('manifest', 'dropped'):
        both = [pq.read_table(tmp_path / k / f'{name}.parquet') for k in ('one', 'two')]
        assert both[0].to_pydict() == both[1].to_pydict() and len(both[0])
    assert one.exists() and 'manifest' in ended[0][1] and 'manifest' not in ended[1][1]
    # A mistake that one process finds ends both with its sentence.
    code = CODE.format(out=out, files=files, words=[*WORDS, 'against.threshold=-1'], **sets)
    ended = [processes.finish(p) for p in processes.twice(code, 2)]
    assert [rc for rc, _ in ended] == [1, 1] and 'No image of the pool is left' in ended[0][1]
