# SPDX-License-Identifier: Apache-2.0
"""The page of `ssl_jax explore` in a real browser: what it draws is what the model computes."""

import contextlib
import dataclasses
import io
import json
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
import zlib

import numpy as np
import PIL.Image
import pytest

import tiny
from ssl_jax import cli
from ssl_jax.app import page as page_lib
from ssl_jax.app import views
from ssl_jax.data import scenes
from ssl_jax.viz import draw

pytest.importorskip('gradio', reason="no Gradio: pip install 'ssl_jax[app]'")
api = pytest.importorskip('playwright.sync_api', reason='no driver: pip install playwright')
BROWSERS = ('chromium-headless-shell', 'chromium', 'google-chrome')
LONG = 60_000  # milliseconds, for a busy machine
SIDE = 384  # of enlarged images: 12 times 32 pixels


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """24 scenes as PNGs, and one file that is no image."""
    root, source = tmp_path_factory.mktemp('images'), scenes.Scenes(24, 32)
    for i in range(24):
        PIL.Image.fromarray(source[i]['image']).save(root / f'{i:02}.png')
    (root / 'zz.png').write_text('<html>404</html>')
    return root


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A tiny MAE that was not trained, with a grid of 4x4 patches."""
    workdir = tmp_path_factory.mktemp('run')
    tiny.save(tiny.config(), workdir)
    return workdir


def brightness(image):
    return (image.mean(axis=2) > 90).astype(np.uint8)


def redness(image):
    return image[..., 0].astype(np.float32) / 100


@pytest.fixture(scope='module')
def look(run, folder):
    heads = (
        views.Head('bright pixels', brightness, ('dark', 'bright')),
        views.Head('redness', redness, unit='au'),
    )
    found = views.look(run, folder)
    return dataclasses.replace(found, heads=heads)


@pytest.fixture(scope='module')
def url(look):
    with page_lib.serving(look, '127.0.0.1', free_port()) as url:
        yield url


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def tab(url):
    """The page, drawn for the first image."""
    browsers = [path for path in map(shutil.which, BROWSERS) if path]
    if not browsers:
        pytest.skip(f'no browser: apt-get install {BROWSERS[0]}')
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browsers[0])
        tab = browser.new_page(viewport={'width': 1400, 'height': 1200})
        tab.set_default_timeout(LONG)
        tab.asked = []
        tab.on('request', lambda request: tab.asked.append(request.url))
        tab.goto(url)
        tab.wait_for_selector('#current img')
        yield tab
        browser.close()


def open_tab(tab, name):
    tab.get_by_role('tab', name=name).click()


def source(tab, selector):
    tab.wait_for_selector(selector)
    return tab.locator(selector).first.get_attribute('src')


def drawn(tab, selector):
    """Pixels of the image elements that are found."""
    tab.wait_for_selector(selector)
    sources = [x.get_attribute('src') for x in tab.locator(selector).all()]
    return [read(tab.request.get(src).body()) for src in sources]


def read(data):
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert('RGB'))


def changed(tab, selector, before, act=None):
    """Waits until another picture is drawn; returns its pixels.

    `act` is what changes it; it is done again after a while, as the page may draw anew under it.
    """
    code = '([s, src]) => {const e = document.querySelector(s); return e && e.src !== src}'
    for _ in range(5 if act else 0):
        act()
        with contextlib.suppress(api.TimeoutError):
            tab.wait_for_function(code, arg=[selector, before], timeout=10000)
            break
    tab.wait_for_function(code, arg=[selector, before])
    return drawn(tab, selector)[0]


def large(image):
    return page_lib._large(image)


def pick(tab, number):
    """Chooses an image of the folder by its number; waits until it is shown."""
    before = source(tab, '#current img')
    box = tab.locator('#number input')
    if box.input_value() == str(number):
        return
    box.fill(str(number))
    box.press('Enter')
    changed(tab, '#current img', before)


def until(tab, is_true):
    """Waits for what the page draws next."""
    for _ in range(LONG // 50):
        if is_true():
            return
        tab.wait_for_timeout(50)
    raise AssertionError('the page did not get there')


def test_an_image_of_the_folder_is_shown_by_its_number(tab, look):
    pick(tab, 5)
    want = views.picture(look, 5)
    np.testing.assert_array_equal(drawn(tab, '#current img')[0], large(want.image))
    assert tab.locator('#name input, #name textarea').input_value() == want.name == '05.png'


def test_an_image_is_chosen_with_a_click(tab, look):
    before = source(tab, '#current img')
    tab.locator('#shelf button.thumbnail-lg, #shelf .thumbnail-item').nth(7).click()
    want = views.picture(look, views.choices(look)[7]).image
    np.testing.assert_array_equal(changed(tab, '#current img', before), large(want))
    until(tab, lambda: tab.locator('#number input').input_value() == str(views.choices(look)[7]))


def box_of_image(tab):
    """(x, y, side) on the screen of the image in the editor, found by its pixels."""
    canvas = tab.locator('#editor canvas').first
    canvas.scroll_into_view_if_needed()
    at, seen = canvas.bounding_box(), read(canvas.screenshot())
    dark = (seen < 235).any(axis=2)
    rows = np.flatnonzero(dark.sum(axis=1) > 150)
    columns = np.flatnonzero(dark[rows].mean(axis=0) > 0.9)
    return at['x'] + columns[0], at['y'] + rows[0], len(columns)


def test_what_is_painted_over_is_hidden_from_the_model_and_predicted(tab, look):
    open_tab(tab, 'Reconstruction')
    pick(tab, 3)
    tab.wait_for_timeout(500)  # the editor draws on a canvas
    x, y, side = box_of_image(tab)
    tab.mouse.move(x + side / 8, y + side / 8)
    tab.mouse.down()
    tab.mouse.move(x + 3 * side / 8, y + side / 8, steps=8)
    tab.mouse.up()
    tab.locator('#go').click()
    masked, *_, filled, original = drawn(tab, '#made img')
    hidden = np.zeros((4, 4), bool)
    hidden[0, :2] = True
    large_hidden = np.kron(hidden, np.ones((96, 96))) > 0
    want = large(views.picture(look, 3).square)
    np.testing.assert_array_equal(masked[~large_hidden], want[~large_hidden])
    assert (masked[large_hidden] == 128).all()
    np.testing.assert_array_equal(original, want)
    made = views.reconstruct(look, views.picture(look, 3), hidden)
    np.testing.assert_array_equal(filled, large(made['stitched']))
    assert np.abs(filled[large_hidden] - want[large_hidden].astype(int)).mean() > 1


def test_a_random_mask_hides_the_share_of_training(tab, look):
    open_tab(tab, 'Reconstruction')
    pick(tab, 4)
    before = source(tab, '#made img') if tab.locator('#made img').count() else ''
    tab.locator('#dice').click()
    masked = changed(tab, '#made img', before)
    patches = masked.reshape(4, 96, 4, 96, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
    assert (patches == 128).all(axis=1).sum() == 12


def test_patches_as_colours_are_those_of_the_model(tab, look):
    pick(tab, 6)
    open_tab(tab, 'Patches as colours')
    (_, _, whole, front), *others = views.pca(look, views.picture(look, 6))
    until(tab, lambda: np.array_equal(drawn(tab, '#pca_all img')[0], large(whole)))
    until(tab, lambda: np.array_equal(drawn(tab, '#pca_front img')[0], large(front)))
    assert len(drawn(tab, '#pca_others img')) == len(others) == 8
    before = source(tab, '#pca_all img')
    tab.locator('#pca_block input').click()
    tab.get_by_role('option', name='block 1 of 2').click()
    whole = views.pca(look, views.picture(look, 6), 'block 1 of 2')[0][2]
    np.testing.assert_array_equal(changed(tab, '#pca_all img', before), large(whole))


def test_each_head_shows_what_the_class_token_attends_to(tab, look):
    pick(tab, 8)
    open_tab(tab, 'Attention')
    maps = views.attention(look, views.picture(look, 8))
    last = large(page_lib._bright(maps[-1]))
    until(tab, lambda: np.array_equal(drawn(tab, '#heads img')[-1], last))
    assert len(drawn(tab, '#heads img')) == 1 + len(maps) == 5
    assert drawn(tab, '#heads img')[2].max() == 255


def test_the_clicked_patch_is_the_brightest_and_other_blocks_say_other_things(tab, look):
    pick(tab, 9)
    open_tab(tab, 'Similar patches')
    until(tab, lambda: tab.locator('#click img').count())
    before = source(tab, '#here img')

    def click():
        at = tab.locator('#click img').bounding_box()
        side = min(at['width'], at['height'])
        x = at['x'] + at['width'] / 2 - side / 2 + side * 5 / 8  # row 1, column 2 of 4
        tab.mouse.click(x, at['y'] + at['height'] / 2 - side / 2 + side * 3 / 8)

    seen = changed(tab, '#here img', before, click)
    middle, (bright,) = seen[48::96, 48::96].astype(int), draw.heat(np.ones(1), 0, 1)
    assert (middle[1, 2] == bright).all()
    green = middle[..., 1]  # grows with similarity
    assert green.argmax() == 6 and (green == green.max()).sum() == 1
    assert (seen[96:192, 192:288][0] == page_lib.MARK).all()

    def is_bright_on_screen():  # as a person sees it, when the page has come to rest
        shot = read(tab.locator('#here img').screenshot())
        inside = shot[shot.shape[0] * 3 // 8, shot.shape[1] // 2 + min(shot.shape[:2]) // 8]
        return np.abs(inside - bright.astype(int)).max() < 12

    until(tab, is_bright_on_screen)
    maps = views.similar(look, views.picture(look, 9), 1, 2)
    first = page_lib._beside(maps[1][1], draw.heat(maps[1][2], 0, 1))
    until(tab, lambda: np.array_equal(drawn(tab, '#there img')[0], first))
    before = source(tab, '#here img')
    tab.locator('#block input').click()
    tab.get_by_role('option', name='block 1 of 2').click()
    other = changed(tab, '#here img', before)
    assert (other[48 + 96, 48 + 192] == bright).all()  # the patch is kept


def test_the_nearest_images_are_those_of_the_features_without_the_image_itself(tab, look):
    pick(tab, 10)
    open_tab(tab, 'Nearest images')
    images = np.stack([views.picture(look, i).image for i in range(24)])
    cls = np.asarray(look.model(images)['cls'])
    cls = cls / np.linalg.norm(cls, axis=1, keepdims=True)
    order = [i for i in np.argsort(-cls @ cls[10]) if i != 10]
    first = large(images[order[0]])
    until(tab, lambda: np.array_equal(drawn(tab, '#near img')[0], first))
    names = tab.locator('#near .caption-label').all_inner_texts()
    assert [name.split()[-1] for name in names] == [f'{i:02}.png' for i in order[:12]]
    assert float(names[0].split()[0]) == pytest.approx(cls[order[0]] @ cls[10], abs=1e-3)


def test_predictions_of_trained_heads_have_names_of_classes_or_a_scale(tab, look):
    pick(tab, 11)
    open_tab(tab, 'Depth and segmentation')
    want = [x for _, x in views.predictions(look, views.picture(look, 11))]
    until(tab, lambda: np.array_equal(drawn(tab, '#predicted img')[0], want[0]))
    np.testing.assert_array_equal(drawn(tab, '#predicted img')[1], want[1])
    assert tab.locator('#predicted .caption-label').all_inner_texts() == [
        'bright pixels',
        'redness',
    ]


@pytest.mark.parametrize(
    'number,sentence',
    [
        (99, 'There is no image 99: the folder has 0 to 24.'),
        (24, 'zz.png cannot be shown: an HTML page, not an image'),
    ],
)
def test_a_number_without_an_image_is_answered_with_a_sentence(tab, number, sentence):
    before = source(tab, '#current img')
    tab.locator('#number input').fill(str(number))
    tab.locator('#number input').press('Enter')
    toast = tab.locator('.toast-wrap').get_by_text(sentence)
    toast.wait_for()
    assert source(tab, '#current img') == before
    tab.locator('.toast-close').first.click()
    toast.wait_for(state='detached')


def png(width, height):
    """A PNG of one colour, of few bytes also if it is giant."""
    rows = b'\0' * ((width + 7) // 8 + 1) * height

    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return len(data).to_bytes(4, 'big') + name + data + crc.to_bytes(4, 'big')

    size = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\1\0\0\0\0'
    data = chunk(b'IHDR', size) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + data


def send(tab, name, data):
    file = {'name': name, 'mimeType': 'image/png', 'buffer': data}
    tab.get_by_test_id('An image of your own-upload-button').set_input_files(file)


def test_an_uploaded_image_is_shown_as_the_model_sees_it(tab, look):
    before = source(tab, '#current img')
    data = io.BytesIO()
    PIL.Image.fromarray(scenes.Scenes(1, 60, split='mine')[0]['image']).save(data, 'PNG')
    send(tab, 'mine.png', data.getvalue())
    want = views.upload(look, data.getvalue(), 'x').image
    np.testing.assert_array_equal(changed(tab, '#current img', before), large(want))


@pytest.mark.parametrize(
    'name,data,sentence',
    [
        ('a.png', b'<html>404</html>', 'an HTML page, not an image'),
        ('notes.txt', b'Dear diary', 'text, not an image'),
        ('cut.png', png(64, 64)[:50], 'truncated or corrupt'),
        ('giant.png', png(20_000, 20_000), 'more than 178 million pixels: a decompression bomb'),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence_on_the_page(tab, name, data, sentence):
    before = source(tab, '#current img')
    send(tab, name, data)
    toast = tab.locator('.toast-wrap').get_by_text('The file cannot be shown')
    toast.wait_for()
    text = toast.inner_text()
    assert sentence in text and 'Traceback' not in text and '\n' not in text.strip()
    assert source(tab, '#current img') == before
    tab.locator('.toast-close').first.click()
    toast.wait_for(state='detached')


def test_the_page_asks_no_other_machine(tab, url):
    hosts = {urllib.parse.urlsplit(x).netloc for x in tab.asked if not x.startswith(('data', 'bl'))}
    assert hosts == {urllib.parse.urlsplit(url).netloc} and len(tab.asked) > 50


def status(url, data=None):
    headers = {'Content-Type': 'application/json'}
    request = urllib.request.Request(url, data and json.dumps(data).encode(), headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_page_has_no_other_name_than_this_machine(url):
    request = urllib.request.Request(url, headers={'Host': 'evil.example'})
    with pytest.raises(urllib.error.HTTPError, match='400'):
        urllib.request.urlopen(request)
    port = urllib.parse.urlsplit(url).port
    assert status(f'http://localhost:{port}/')[0] == 200


def test_no_file_is_opened_by_its_path(url, folder, run):
    assert status(url)[0] == 200
    for path in ('/etc/passwd', folder / '00.png', run / 'config.json', 'pyproject.toml'):
        code, body = status(f'{url}gradio_api/file={path}')
        assert code in (403, 404) and b'root:' not in body, path


def test_a_path_in_place_of_an_upload_is_refused(url, look, folder):
    page = status(url + 'config')[1]
    config = json.loads(page)
    own = next(c['id'] for c in config['components'] if c['props'].get('elem_id') == 'own')
    call = next(d['id'] for d in config['dependencies'] if d['inputs'] == [own])
    for path in (folder / '00.png', '/etc/passwd'):
        value = {'path': str(path), 'meta': {'_type': 'gradio.FileData'}}
        data = {'data': [value], 'fn_index': call, 'session_hash': 'hostile'}
        code, body = status(url + 'gradio_api/run/predict', data)
        assert code >= 400 and b'root:' not in body, body
        code, body = status(url + 'gradio_api/queue/join', data)
        if code == 200:
            with urllib.request.urlopen(
                url + 'gradio_api/queue/data?session_hash=hostile', timeout=60
            ) as events:
                said = b''.join(line for line in events if b'process_completed' in line)
            assert b'"success":false' in said.replace(b' ', b''), said


# Without a browser.


def labels(look):
    return [
        c['props']['label']
        for c in page_lib.build(look).get_config_file()['components']
        if c['type'] == 'tabitem'
    ]


def test_tabs_that_a_model_cannot_fill_are_not_there(look):
    assert labels(look) == [
        'Reconstruction',
        'Patches as colours',
        'Attention',
        'Similar patches',
        'Nearest images',
        'Depth and segmentation',
    ]
    bare = dataclasses.replace(look, trained=None, heads=())
    assert labels(bare) == ['Patches as colours', 'Attention', 'Similar patches', 'Nearest images']


def test_a_taken_port_is_one_sentence_before_anything_is_read(capsys):
    with socket.create_server(('127.0.0.1', 0)) as taken, pytest.raises(SystemExit):
        port = str(taken.getsockname()[1])
        cli.main(['explore', '--model', '/nowhere', '--data', '/nowhere', '--port', port])
    said = capsys.readouterr().err.strip()
    assert f'127.0.0.1:{port}' in said and '--port' in said and len(said.splitlines()) == 1
