# SPDX-License-Identifier: Apache-2.0
"""The report of a run: complete, self-contained, and made of whatever the workdir has."""

import base64
import html.parser
import io
import json
import re
import shutil
import threading

import numpy as np
import PIL.Image
import pytest

import tiny
from ssl_jax import cli, report
from ssl_jax.report import page, plots, runs
from ssl_jax.run import errors, uploads

BROWSERS = ('chromium-headless-shell', 'chromium', 'google-chrome')
HOSTILE = '<script>alert(1)</script>"\'><img src=http://evil.example/x>&'
LOADING = ('src', 'href', 'srcset', 'data', 'action', 'poster', 'background', 'xlink:href')


class Page(html.parser.HTMLParser):
    """What a page says, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.words, self.styles, self._in = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in LOADING]
        self.styles += [value for name, value in attrs if name == 'style']
        assert not [name for name, _ in attrs if name.startswith('on')]
        self._in.append(tag)

    def handle_data(self, data):
        (self.styles if self._in and self._in[-1] == 'style' else self.words).append(data)

    @property
    def text(self):
        return ' '.join(' '.join(self.words).split())


def picture(size=(60, 40), noise=False):
    pixels = np.full((*size[::-1], 3), 128, np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def config(**more):
    fields = dict(name='cats', batch_size=8, total_steps=40, seed=3, optim={'lr': 0.001})
    method = dict(name='mae', depth=2, embed_dim=32, num_heads=4, patch_size=8, img_size=32)
    data = {'train': {'source': 'folder', 'path': '/images/cats'}}
    return fields | dict(method=method, data=data) | more


def meta(**more):
    """Of a checkpoint, without its checksum."""
    tensors = {'model/params/encoder/norm/scale': {'type': 'float32[2, 5]', 'sum': 0}}
    about = dict(data='abc+123', images=160, step=40, devices=4, device='TPU v5', processes=2)
    return about | dict(mesh={'data': 4}, versions={'ssl_jax': '0.0.9'}, tensors=tensors) | more


def score(model, top1, kind='linear', feature='cls'):
    protocol = dict(eval=kind, resolution=32, of=feature)
    return dict(model=model, eval=kind, feature=feature, top1=top1, top5=90.0,
                protocol=protocol, protocol_id='1234abcd')  # fmt: skip


def make(workdir, monkeypatch=None, rows=None, **fields):
    """A workdir with everything."""
    (workdir / 'pictures').mkdir(parents=True)
    (workdir / 'config.json').write_text(json.dumps(config(**fields)))
    rows = rows or [
        {'step': s, 'loss': 1 / s, 'lr': 1e-3, 'time': {'images_per_second': 50.0, 'mfu': 0.25}}
        for s in (10, 20, 30, 40)
    ] + [{'step': 40, 'knn/cls/20': 61.5}]
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (workdir / 'pictures' / 'reconstruction_0000040.png').write_bytes(picture())
    seconds = {'step': 75.0, 'compile': 20.0, 'eval': 5.0}
    ledger = dict(step=40, steps=40, time=0, finished=True, seconds=seconds)
    (workdir / 'ledger.json').write_text(json.dumps(ledger))
    rows = [score('trained', 71.25), score('untrained', 12.5)]
    (workdir / 'eval_40.json').write_text(json.dumps(rows))
    return workdir


@pytest.fixture
def sealed(monkeypatch):
    """Checkpoints without tensors: only their meta is read."""
    found = {}
    monkeypatch.setattr(
        runs.checkpoint, 'newest_meta', lambda path: found.get(str(path.parent), meta())
    )
    return found


def written(*workdirs):
    return Page((report.write(workdirs)).read_text())


def test_the_page_says_what_was_trained_on_what(tmp_path, sealed):
    text = written(make(tmp_path / 'cats_1')).text
    for fact in (
        'cats: cats_1', 'step 40 of 40, finished', 'ViT of 2 blocks, width 32, 4 heads',
        'source folder', 'path /images/cats', '160, fingerprint abc+123', '40 steps of 8 images',
        '2.0 epochs', '4 x TPU v5, mesh data 4; processes: 2', 'ssl_jax 0.0.9', 'seed 3',
    ):  # fmt: skip
        assert fact in text, fact


def test_the_page_shows_scores_beside_the_baselines_with_their_protocols(tmp_path, sealed):
    text = written(make(tmp_path / 'run')).text
    assert re.search(r'trained cls 71\.25 90 1234abcd untrained cls 12\.50 90 1234abcd', text)
    assert 'Protocols 1234abcd' in text and '"resolution": 32' in text


def test_the_page_says_goodput_and_how_to_go_on(tmp_path, sealed):
    workdir = make(tmp_path / 'a run')
    text = written(workdir).text
    assert 'Goodput 75%' in text and 'compile 0:20 20.0%' in text and 'MFU 25.0%' in text
    assert f"ssl_jax export --workdir '{workdir}' --to hf" in text
    assert f"ssl_jax.load_model('{workdir}')" in text


def test_nothing_is_loaded_from_outside(tmp_path, sealed):
    found = written(make(tmp_path / 'run'))
    assert found.loads and all(x.startswith('data:image/') for x in found.loads)
    assert not re.search(r'url\(|@import|https?:', ' '.join(found.styles))
    assert not {'script', 'link', 'iframe', 'object', 'embed', 'base'} & {*found.tags}


def test_curves_are_drawn_from_the_metrics(tmp_path, sealed):
    out = report.write([make(tmp_path / 'run')]).read_text()
    title = re.search(r'<h3>Training loss</h3>(.*?)</figure>', out)[1]
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', title)]
    assert len(ys) == 4 and ys == sorted(ys)  # the loss falls: down on the screen is larger
    assert '0.025 at step 40' in title


@pytest.mark.parametrize(
    'name', ['config.json', 'ledger.json', 'eval_40.json', 'pictures', 'metrics.jsonl']
)
def test_a_part_that_is_absent_is_said_and_no_error(tmp_path, sealed, name):
    workdir = make(tmp_path / 'run')
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = written(workdir).text
    said = {
        'config.json': 'config.json is absent',
        'ledger.json': 'There is no ledger.json',
        'eval_40.json': 'there is no evaluation yet',
        'pictures': 'There are no pictures',
        'metrics.jsonl': 'There are no metrics',
    }
    assert said[name] in text and 'could not be made' not in text


def test_a_run_without_a_checkpoint_has_a_report(tmp_path):
    text = written(make(tmp_path / 'run')).text
    assert 'There is no checkpoint' in text and '0.025 at step 40' in text


@pytest.mark.parametrize(
    'name', ['config.json', 'ledger.json', 'eval_40.json', 'plan.json']
)  # fmt: skip
@pytest.mark.parametrize('content', ['{"torn', '[1, {}]', '{"seconds": 3, "data": 4}'])
def test_a_damaged_file_costs_only_its_part(tmp_path, sealed, name, content):
    workdir = make(tmp_path / 'run')
    (workdir / name).write_text(content)
    assert '0.025 at step 40' in written(workdir).text


def test_a_broken_line_of_metrics_and_a_broken_picture_are_said(tmp_path, sealed):
    workdir = make(tmp_path / 'run')
    with open(workdir / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 50, "lo\n\x00\x00\n[]\n')
    (workdir / 'pictures' / 'pca.png').write_bytes(picture()[:60])
    text = written(workdir).text
    assert '3 lines of metrics.jsonl cannot be read' in text and '0.025 at step 40' in text
    assert 'pictures/pca.png cannot be read' in text


def test_hostile_text_is_escaped_wherever_it_comes_from(tmp_path, sealed):
    rows = [{'step': 1, 'loss': 1.0, HOSTILE: 2.0, f'{HOSTILE}/a': 1.0, f'failed/{HOSTILE}': 1.0}]
    workdir = make(
        tmp_path / 'run', rows=rows, name=HOSTILE, data={'train': HOSTILE}, **{HOSTILE: HOSTILE}
    )
    sealed[str(workdir)] = meta(data=HOSTILE, device=HOSTILE, versions={HOSTILE: HOSTILE})
    bad = dict(score(HOSTILE, 1.0, HOSTILE, HOSTILE), protocol={HOSTILE: HOSTILE})
    bad |= dict(protocol_id=HOSTILE, scores={HOSTILE: 1.0, 'text': HOSTILE})
    (workdir / 'eval_40.json').write_text(json.dumps([bad, {**bad, 'scores': {'x': HOSTILE}}]))
    (workdir / 'ledger.json').write_text(json.dumps({'seconds': {HOSTILE: 5.0, 'step': 1.0}}))
    (workdir / 'plan.json').write_text(
        json.dumps(dict(topology=HOSTILE, command=HOSTILE, mfu=HOSTILE))
    )
    plain = {*written(make(tmp_path / 'plain')).tags}
    shutil.copy(workdir / 'pictures/reconstruction_0000040.png', workdir / f'pictures/{"<b>"}.png')
    for found in (written(workdir), written(workdir, tmp_path / 'plain')):
        assert {*found.tags} <= plain and all(x.startswith('data:') for x in found.loads)
        assert found.text.count(HOSTILE) > 10
        assert re.findall('could not be made.{40}', found.text) == []


def test_two_runs_show_first_which_fields_differ(tmp_path, sealed):
    a = make(tmp_path / 'a')
    b = make(tmp_path / 'b', optim={'lr': 0.002})
    sealed[str(b)] = meta(images=170)
    text = written(a, b).text
    first = text[: text.index('What was trained')]
    assert 'field a b' in first and 'optim.lr 0.001 0.002' in first
    assert 'number of images 160 170' in first
    assert 'seed' not in first and 'batch_size' not in first


def test_two_runs_share_each_chart_and_keep_their_colours(tmp_path, sealed):
    a = make(tmp_path / 'a')
    b = make(tmp_path / 'b', rows=[{'step': s, 'loss': s, 'other': s} for s in (1, 2)])
    out = page.page(runs.read_all([a, b]))
    loss = re.search(r'<h3>Training loss</h3>(.*?)</figure>', out)[1]
    assert 'path class="line c0"' in loss and 'path class="line c1"' in loss
    other = re.search(r'<h3>other</h3>(.*?)</figure>', out)[1]
    assert 'line c1' in other and 'line c0' not in other


def test_runs_of_one_name_are_told_apart(tmp_path, sealed):
    workdirs = [make(tmp_path / part / 'run') for part in ('x', 'y')]
    found = runs.read_all(workdirs)
    assert [run.name for run in found] == [str(path) for path in workdirs]


def test_what_went_wrong_is_listed_with_its_step(tmp_path, sealed):
    healthy = {'features/std': 0.5, 'features/cosine': 0.2, 'features/rankme': 20.0}
    rows = [
        {'step': 10, 'loss': 1.0, 'skipped_total': 0},
        {'step': 20, 'loss': 1.0, 'skipped_total': 2},
        {'step': 20, **healthy},
        {'step': 30, 'loss': 'nan', 'skipped_total': 2},
        {'step': 40, 'loss': 1.0, 'skipped_total': 2},
        {'step': 40, **healthy, 'features/std': 0.001, 'failed/knn': 1.0},
    ]
    workdir = make(tmp_path / 'run', rows=rows)
    (workdir / 'bad_images.jsonl').write_text('{}\n{}\n')
    events = runs.read_all([workdir])[0].events
    assert [step for step, _ in events] == [20, 30, 40, 40, None]
    assert events[0][1].startswith('2 updates were skipped') and events[1][1] == 'loss is nan.'
    assert events[2][1].startswith('Collapse suspected: feature std is 0.001')
    assert events[3][1].startswith('The evaluation knn failed')
    assert events[4][1].startswith('2 images could not be decoded')
    text = written(workdir).text
    assert all(event in text for _, event in events) and 'Nothing stands out' not in text


def test_the_collapse_that_a_method_suspects_is_told_from_its_step_on(tmp_path, sealed):
    healthy = {'teacher_entropy': 1.0, 'kl_uniform': 0.0, 'prototype_use': 0.5}
    collapsed = {**healthy, 'teacher_entropy': 4.158}  # of at most log 64
    found = {2: healthy, 30: healthy, 40: collapsed, 50: collapsed}
    rows = [{'step': step, 'loss': 1.0, **values} for step, values in found.items()]
    workdir = make(tmp_path / 'run', rows=rows)
    (workdir / 'config.json').write_text(json.dumps(tiny.dinov2(total_steps=60).to_dict()))
    ((step, sentence),) = runs.read_all([workdir])[0].events
    assert step == 40 and sentence.startswith('Collapse to uniform suspected')


def test_a_plan_is_shown_beside_what_was_measured(tmp_path, sealed):
    workdir = make(tmp_path / 'run')
    plan = dict(topology='v5e:2x2', command='ssl_jax plan', images_per_second=80.0, mfu=0.4)
    plan |= dict(batch_size=8, devices=4)
    (workdir / 'plan.json').write_text(json.dumps(plan))
    text = written(workdir).text
    assert 'images per second 80 50' in text and 'MFU 0.4 0.25' in text
    assert 'no forecast' not in text
    (workdir / 'plan.json').write_text(json.dumps({**plan, 'devices': 64}))
    assert 'no forecast' in written(workdir).text


def test_large_and_many_pictures_leave_a_page_below_5_mb(tmp_path, sealed):
    workdir = make(tmp_path / 'run')
    noise = picture((700, 500), noise=True)
    assert len(noise) > 1e6
    for i in range(10):
        (workdir / f'pictures/reconstruction_{100 + i:07d}.png').write_bytes(noise)
        (workdir / f'pictures/kind{i}.png').write_bytes(noise)
    out = report.write([workdir])
    assert len(out.read_bytes()) < 5e6
    found = Page(out.read_text())
    assert 'Left out, as the page would be too large' in found.text
    assert 'reconstruction, step 109' in found.text  # the newest comes first
    for uri in found.loads:
        PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2]))).load()


def test_a_long_curve_keeps_its_spikes_and_few_points():
    y = np.zeros(50_000)
    y[33_333] = 7.0
    x, thin = plots._thinned(np.arange(50_000.0), y)
    assert len(x) < 1000 and thin.max() == 7.0 and (x[0], x[-1]) == (0, 49_999)


@pytest.mark.parametrize('values', [[0.0], [5.0, 5.0], [-1e-9, 1e9], [1e-12, 1e-3, 1e6]])
@pytest.mark.parametrize('kind', ['', 'zero', 'log'])
def test_every_chart_stays_within_its_frame(values, kind):
    x = np.arange(1.0, 1 + len(values))
    drawn = plots.chart([plots.Line('a', x, np.array(values))], kind)
    assert 'nan' not in drawn
    for key, most in (('cx', plots.WIDTH), ('cy', plots.HEIGHT)):
        found = [float(v) for v in re.findall(rf'{key}="(.*?)"', drawn)]
        assert len(found) == len(values) and all(0 <= v <= most for v in found)


def test_a_folder_without_a_run_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(errors.UserError, match='holds no run'):
        report.write([tmp_path])


def test_the_command_takes_several_workdirs_and_a_file(tmp_path, sealed, capsys):
    a, b = make(tmp_path / 'a'), make(tmp_path / 'b')
    out = tmp_path / 'both.html'
    cli.main(['report', '--workdir', str(a), '--workdir', str(b), '--out', str(out)])
    assert '2 runs: a, b' in Page(out.read_text()).text and str(out) in capsys.readouterr().out
    assert not (a / report.FILE).exists()


def test_a_report_that_fails_is_a_line_and_no_error(tmp_path, sealed, monkeypatch, capfd):
    workdir = make(tmp_path / 'run')

    def full(path, data):
        raise OSError('No space left on device')

    monkeypatch.setattr(uploads, 'put', full)
    report.refresh(workdir, is_new=True)
    assert 'report.html is not written (OSError: No space' in capfd.readouterr().err


def test_a_bucket_that_does_not_answer_delays_the_end_of_a_run_only_shortly(monkeypatch, capfd):
    answered = threading.Event()
    monkeypatch.setattr(uploads, 'CLOSE_SECONDS', 0.05)
    monkeypatch.setattr(report, 'write', lambda workdirs: answered.wait(20))
    report.refresh('gs://bucket/run', is_new=True)
    assert not answered.is_set() and 'the bucket does not answer' in capfd.readouterr().err
    answered.set()
    for thread in threading.enumerate():
        if thread.name == 'report':
            thread.join()


def test_other_commands_make_an_old_report_anew_and_no_new_one(tmp_path, sealed):
    workdir = make(tmp_path / 'run')
    report.refresh(workdir)
    assert not (workdir / report.FILE).exists()
    (workdir / report.FILE).write_text('old')
    report.refresh(workdir)
    assert '71.25' in (workdir / report.FILE).read_text()


def test_the_page_reads_well_in_a_browser_from_a_disk(tmp_path, sealed):
    """At both widths: nothing sticks out, no error, no request but for the file."""
    api = pytest.importorskip('playwright.sync_api', reason='no driver: pip install playwright')
    found = [path for path in map(shutil.which, BROWSERS) if path]
    if not found:
        pytest.skip(f'no browser: apt-get install {BROWSERS[0]}')
    long = 'x' * 300
    workdir = make(tmp_path / long[:100], name=long, data={'train': f'/{long}'}, **{long: long})
    out = report.write([workdir])
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found[0])
        for width in (1280, 400):
            tab, asked, said = browser.new_page(viewport={'width': width, 'height': 900}), [], []
            tab.on('request', lambda request, asked=asked: asked.append(request.url))
            tab.on('console', lambda message, said=said: said.append(message.text))
            tab.on('pageerror', lambda error, said=said: said.append(str(error)))
            tab.goto(f'file://{out}')
            tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert tab.evaluate('document.documentElement.scrollWidth') <= width
            assert tab.locator('figure svg').count() >= 4
            sizes = tab.evaluate('[...document.images].map(i => i.naturalWidth)')
            assert sizes == [60] and not said
            assert all(url.startswith(('file:', 'data:')) for url in asked)
            tab.close()
        browser.close()
