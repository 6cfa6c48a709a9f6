# SPDX-License-Identifier: Apache-2.0
"""The web page: layout and events. What it shows is computed in `app.views`.

The browser names images by their number and sends bytes, never paths. The page needs no network
and calls nobody: system fonts, no analytics, no share links.
"""

import contextlib
import functools
import os
import signal
import socket
import tempfile
import threading
import urllib.request

import numpy as np

from ssl_jax.app import views
from ssl_jax.run import errors, launch
from ssl_jax.viz import draw

SIDE = 384  # pixels that an image is enlarged to, at least, by repeating its own
UPLOAD = '64mb'  # most of an uploaded file
KEPT = 3600, 86400  # seconds between two looks for pictures to delete, and of their lives
MARK = (255, 0, 110)  # colour of the frame around a clicked patch
LOCAL = ('127.0.0.1', 'localhost', '::1')
MASK = (
    'Paint over what the model shall not see: a patch is hidden if a quarter of it is painted. '
    'It predicts the hidden patches from the others.'
)
COMPONENTS = (
    'Principal components of the patch tokens as red, green and blue: of all patches, and of the '
    'foreground alone (one side of a threshold on the first component). They are those of this '
    'image and {others} others together, so that equal colours mean similar features. Subtracted '
    'before: the mean token of each position over {averaged} images.'
)
ATTENTION = (
    'What the class token attends to in the last block, head by head; each map is scaled by its '
    'largest value.'
)
SIMILARITY = (
    'Click a patch: how similar its token is to the others of this image and of the nearest '
    'images. Cosine after subtracting the mean token of each position over {averaged} images; dark '
    'is 0 or less, bright is 1.'
)
NEAREST = 'The images of the folder with the most similar features, with their cosine.'
PREDICTED = 'What heads that were trained on the frozen features of this encoder predict.'


def explore(path, data, host: str, port: int, limit: int = views.LIMIT) -> None:
    """Serves the page until Ctrl+C: `ssl_jax explore`.

    Args:
      path: of weights.
      data: path or spec of images.
      host, port: where it can be opened.
      limit: most images that neighbours are searched among.

    Raises:
      UserError: Gradio is missing, weights or images cannot be read, or the port is taken.
    """
    _gradio()
    _check_port(host, port)
    look = views.look(path, data, limit)
    if host not in LOCAL:
        launch.log(f'everyone who reaches {host}:{port} sees these images: there is no password')
    # Ended by Ctrl+C or SIGTERM, it leaves no image in the temporary folder.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), serving(look, host, port) as url:
        launch.log(f'{url} (Ctrl+C ends it)')
        threading.Event().wait()


@contextlib.contextmanager
def serving(look: views.Look, host: str, port: int):
    """``with serving(LOOK, HOST, PORT) as url:`` the page is there within the block."""
    with tempfile.TemporaryDirectory(prefix='ssl_jax_explore_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder  # what the page shows and what is uploaded
        page = build(look)
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            inbrowser=False,
            prevent_thread_lock=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            num_workers=0,
            run_history=False,
            footer_links=[],
            allowed_paths=[],
            app_kwargs=dict(middleware=_middleware(host)),
            max_file_size=UPLOAD,
            theme=_gradio().themes.Default(font='sans-serif', font_mono='monospace'),
            css='#current img, .pixels img {image-rendering: pixelated}',
        )
        try:
            yield url
        finally:
            page.close(verbose=False)


def _middleware(host):
    """Of a page for this machine alone: it has no other name.

    Without this the page of another site could name itself 127.0.0.1 and read the images (DNS
    rebinding).
    """
    if host not in LOCAL:
        return []
    middleware = errors.extra('starlette.middleware', 'app').Middleware
    trusted = errors.extra('starlette.middleware.trustedhost', 'app').TrustedHostMiddleware
    return [middleware(trusted, allowed_hosts=[*LOCAL])]


def _gradio():
    """The library, which calls home and opens folders only if the environment says so."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_DISABLE_TELEMETRY='1')
    os.environ.pop('GRADIO_ALLOWED_PATHS', None)
    # It asks its own server whether it is there; a proxy would not find it.
    direct = urllib.request.getproxies().get('no', '')
    os.environ['no_proxy'] = ','.join(filter(None, [direct, *LOCAL]))
    return errors.extra('gradio', 'app')


def _check_port(host, port):
    """Raises if the page could not be served there; better before the model is read."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise errors.UserError(
            f'the page cannot be served at {host}:{port} ({error}): give another --port or --host.'
        ) from error


def build(look: views.Look):
    """The page of a model and its images, a `gradio.Blocks`."""
    gr = _gradio()
    offered = views.choices(look)
    pixels = dict(interactive=False, format='png', buttons=['download', 'fullscreen'])
    row = dict(format='png', object_fit='contain', height='auto', elem_classes='pixels')
    blocks = dict(choices=look.blocks, value=look.blocks[0], label='block', filterable=False)
    counts = dict(averaged=views.averaged(look), others=min(views.OTHERS, len(look.ids)))

    def event(listen, run, inputs, outputs, **options):
        """One at a time for all visitors: they share a device. Errors of users are a sentence."""

        @functools.wraps(run)
        def guarded(*args):
            try:
                return run(*args)
            except errors.UserError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from error

        options = dict(concurrency_id='model', concurrency_limit=1, api_visibility='private')
        return listen(guarded, inputs, outputs, show_progress='minimal', **options)

    about = dict(title='ssl_jax explore', analytics_enabled=False, delete_cache=KEPT)
    with gr.Blocks(**about) as page:
        state, patch = gr.State(None), gr.State(None)
        gr.Markdown(f'### `{look.model.source}`\n{len(look.source):,} images')
        with gr.Row():
            with gr.Column(scale=1):
                current = gr.Image(label='image as the model sees it', elem_id='current', **pixels)
                name = gr.Textbox(label='name', interactive=False, elem_id='name')
                last = len(look.source) - 1
                number = gr.Number(
                    label=f'its number, 0 to {last}',
                    precision=0,
                    elem_id='number',
                    value=offered[0],
                )
                own = gr.UploadButton('An image of your own', type='binary', elem_id='own')
                shelf = gr.Gallery(
                    label='or one of these',
                    columns=3,
                    allow_preview=False,
                    elem_id='shelf',
                    **row,
                )
            with gr.Column(scale=3), gr.Tabs(overflow_behavior='wrap'):
                drawn = []  # (function of the picture and other inputs, those, outputs)
                if look.trained:
                    with gr.Tab('Reconstruction', id='reconstruction'):
                        gr.Markdown(MASK)
                        side = look.training_transform['size']
                        side *= _factor(side)
                        with gr.Row():
                            editor = gr.ImageEditor(
                                label='paint here',
                                elem_id='editor',
                                sources=(),
                                transforms=(),
                                layers=False,
                                brush=gr.Brush(colors=['#808080'], default_size=side // 8),
                                canvas_size=(side, side),
                                fixed_canvas=True,
                                format='png',
                                buttons=[],
                            )
                        with gr.Row():
                            go = gr.Button('Reconstruct', variant='primary', elem_id='go')
                            dice = gr.Button('A random mask, as in training', elem_id='dice')
                        made = gr.Gallery(
                            label='hidden and predicted', columns=3, elem_id='made', **row
                        )
                        seed = gr.State(0)
                with gr.Tab('Patches as colours', id='pca'):
                    gr.Markdown(COMPONENTS.format(**counts))
                    pca_block = gr.Dropdown(**blocks, elem_id='pca_block')
                    with gr.Row(elem_classes='pixels'):
                        whole = gr.Image(label='all patches', elem_id='pca_all', **pixels)
                        front = gr.Image(label='foreground', elem_id='pca_front', **pixels)
                    label = 'others: image, all patches, foreground'
                    rest = gr.Gallery(label=label, columns=3, elem_id='pca_others', **row)
                    drawn.append((_components, [pca_block], [whole, front, rest]))
                if look.model.vit.num_cls_tokens:
                    with gr.Tab('Attention', id='attention'):
                        gr.Markdown(ATTENTION)
                        heads = gr.Gallery(label='attention', columns=4, elem_id='heads', **row)
                        drawn.append((_heads, [], [heads]))
                with gr.Tab('Similar patches', id='similar'):
                    gr.Markdown(SIMILARITY.format(**counts))
                    block = gr.Dropdown(**blocks, elem_id='block')
                    with gr.Row(elem_classes='pixels'):
                        click = gr.Image(label='click a patch', elem_id='click', **pixels)
                        here = gr.Image(label='similarity', elem_id='here', **pixels)
                    label = 'in the nearest images'
                    there = gr.Gallery(label=label, columns=4, elem_id='there', **row)
                    drawn.append((_similarity, [block, patch], [click, here, there]))
                with gr.Tab('Nearest images', id='nearest'):
                    gr.Markdown(NEAREST)
                    kinds = list(look.features)
                    feature = gr.Dropdown(kinds, value=kinds[0], label='feature', elem_id='feature')
                    near = gr.Gallery(label='nearest first', columns=4, elem_id='near', **row)
                    drawn.append((_nearest, [feature], [near]))
                if look.heads:
                    with gr.Tab('Depth and segmentation', id='heads'):
                        gr.Markdown(PREDICTED)
                        predicted = gr.Gallery(
                            label='predictions', columns=2, elem_id='predicted', **row
                        )
                        drawn.append((_predictions, [], [predicted]))

        # A new picture: its number or its bytes become the state, then everything is drawn.
        def chosen(index):
            return views.picture(look, index), None

        def clicked(event: gr.SelectData):
            if not isinstance(event.index, int) or not 0 <= event.index < len(offered):
                raise errors.UserError(f'There is no image {event.index} to choose.')
            return chosen(offered[event.index])

        def uploaded(data):
            return views.upload(look, data, 'The file'), None

        def show(picture):
            big = _large(picture.image)
            more = [{'background': _large(picture.square), 'layers': [], 'composite': None}]
            index = picture.index if picture.index >= 0 else None
            return [big, picture.name, index, *(more if look.trained else [])]

        shown = [current, name, number, *([editor] if look.trained else [])]
        event(page.load, lambda: [views.picture(look, i).image for i in offered], None, [shelf])
        takes = [
            event(page.load, lambda: chosen(offered[0]), None, [state, patch]),
            event(number.submit, chosen, [number], [state, patch]),
            event(shelf.select, clicked, None, [state, patch]),
            event(own.upload, uploaded, [own], [state, patch]),
        ]
        for take in takes:
            event(take.success, show, [state], shown)
            for run, inputs, outputs in drawn:
                event(take.success, functools.partial(run, look), [state, *inputs], outputs)

        # A choice within a tab.
        for run, inputs, outputs in drawn:
            for component in inputs:
                if component is not patch:
                    again = functools.partial(run, look)
                    event(component.input, again, [state, *inputs], outputs)

        def touched(picture, block, event: gr.SelectData):
            at = _patch(look, picture, event.index)
            return [at, *_similarity(look, picture, block, at)]

        event(click.select, touched, [state, block], [patch, click, here, there])
        if look.trained:

            def painted(picture, value):
                return _reconstruction(look, picture, _hidden(look, value))

            def random(picture, seed):
                return [_reconstruction(look, picture, None, seed), seed + 1]

            event(go.click, painted, [state, editor], [made])
            event(dice.click, random, [state, seed], [made, seed])
    return page


# From results of `views` to values of components.


def _components(look, picture, block):
    (_, _, whole, front), *others = views.pca(look, picture, block)
    rest = [(_beside(image, *colours), name) for name, image, *colours in others]
    return [_large(whole), _large(front), rest]


def _heads(look, picture):
    maps = views.attention(look, picture)
    both = [(_beside(picture.image, _bright(maps.mean(axis=0))), 'mean of the heads')]
    each = [(_large(_bright(x)), f'head {i + 1}') for i, x in enumerate(maps)]
    return both + each


def _similarity(look, picture, block, patch):
    row, column = patch or (n // 2 for n in look.grid)
    (_, image, here), *others = views.similar(look, picture, row, column, block)
    frame = _frame(_large(image), look.grid, row, column)
    maps = [(_beside(x, draw.heat(values, 0, 1)), name) for name, x, values in others]
    return [frame, _frame(_large(draw.heat(here, 0, 1)), look.grid, row, column), maps]


def _nearest(look, picture, feature):
    found = views.nearest(look, picture, 12, feature)
    pictures = [(views.picture(look, i), cosine) for i, cosine in found]
    return [(_large(p.image), f'{cosine:.3f}  {p.name}') for p, cosine in pictures]


def _predictions(look, picture):
    return [(x, name) for name, x in views.predictions(look, picture)]


def _reconstruction(look, picture, hidden, seed=0):
    found = views.reconstruct(look, picture, hidden, seed)
    names = {key: name for key, name in draw.COLUMNS[1:]}
    return [(_large(found[key]), name) for key, name in names.items() if key in found]


def _hidden(look, value):
    """Painted patches of what the editor sent."""
    layers = [x for x in (value or {}).get('layers', ()) if x is not None and x.ndim == 3]
    alpha = functools.reduce(np.maximum, (x[..., 3] for x in layers if x.shape[2] == 4), 0)
    side = look.training_transform['size'] // look.model.vit.patch_size
    if not np.any(alpha):
        raise errors.UserError('Nothing is painted: paint over a part of the image first.')
    return views.painted(alpha, (side, side))


def _patch(look, picture, index):
    """(row, column) of the patch at pixel (x, y) of the enlarged image."""
    side = picture.image.shape[0] * _factor(picture.image.shape[0])
    x, y = (min(max(int(value), 0), side - 1) for value in index)
    return y * look.grid[0] // side, x * look.grid[1] // side


def _factor(side):
    return max(1, -(-SIDE // side))


def _large(image):
    """Each pixel repeated, so that the image has about SIDE pixels or more."""
    return image.repeat(_factor(len(image)), axis=0).repeat(_factor(len(image)), axis=1)


def _bright(x):
    """A map (h, w) as grey, its largest value white."""
    grey = (x / max(float(x.max()), 1e-12) * 255 + 0.5).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _beside(image, *maps):
    """An image and maps of patches side by side, at the size of the image."""
    factor = [len(image) // len(x) for x in maps]
    maps = [x.repeat(n, axis=0).repeat(n, axis=1) for x, n in zip(maps, factor, strict=True)]
    return _large_by(np.concatenate([image, *maps], axis=1), max(1, 128 // len(image)))


def _large_by(image, factor):
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _frame(image, grid, row, column):
    """The image with a frame around a patch."""
    (h, w), image = image.shape[:2], image.copy()
    y0, y1 = (h * i // grid[0] for i in (row, row + 1))
    x0, x1 = (w * i // grid[1] for i in (column, column + 1))
    inside = image[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].copy()
    image[y0:y1, x0:x1] = MARK
    image[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3] = inside
    return image
