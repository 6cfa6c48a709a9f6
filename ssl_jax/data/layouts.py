# SPDX-License-Identifier: Apache-2.0
"""Which file is the map of which image: folders of pairs, and the layouts of known data sets.

Names are relative, with '/'. A pair is a file below a folder with a name of IMAGES and one below a
folder with a name of MAPS in its place, otherwise alike but for the extension; a split may stand
before or after the name, as in `train_images/` and `train_masks/`.
"""

import dataclasses
import os
import re
from collections.abc import Callable

from ssl_jax.data import files, maps, splits
from ssl_jax.run import errors

# Lower-case names of folders.
IMAGES = {
    *('images', 'image', 'img', 'imgs', 'rgb', 'jpegimages', 'leftimg8bit', 'images_png'),
    *('photos', 'color', 'colour', 'frames', 'image_2'),
}
MAPS = {
    'segmentation': (
        *('labels', 'label', 'annotations', 'annotation', 'masks', 'mask', 'segmentationclass'),
        *('segmentationclassaug', 'segmentation', 'segmentations', 'gtfine', 'gt', 'groundtruth'),
        *('ground_truth', 'masks_png', 'label_maps', 'labelmaps', 'semantic', 'annot', 'annots'),
        'seg',
    ),
    'depth': ('depth', 'depths', 'depth_maps', 'depth_map'),
}
OF_DEPTH = 'nyuv2', 'kitti'
KIND = {name: kind for kind, names in MAPS.items() for name in names}
_RANK = {name: k for names in MAPS.values() for k, name in enumerate(names)}

VOC = (
    *('background', 'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat'),
    *('chair', 'cow', 'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant'),
    *('sheep', 'sofa', 'train', 'tvmonitor'),
)
CITYSCAPES = {  # class: its value in *_labelIds.png
    **{'road': 7, 'sidewalk': 8, 'building': 11, 'wall': 12, 'fence': 13, 'pole': 17},
    **{'traffic light': 19, 'traffic sign': 20, 'vegetation': 21, 'terrain': 22, 'sky': 23},
    **{'person': 24, 'rider': 25, 'car': 26, 'truck': 27, 'bus': 28, 'train': 31},
    **{'motorcycle': 32, 'bicycle': 33},
}


_KNOWN = {  # of each layout, what its maps mean
    'ade20k': dict(meaning=dict(reduce_zero_label=True), classes=tuple(map(str, range(150)))),
    'voc': dict(classes=VOC),
    'cityscapes': dict(
        meaning=dict(label_values=tuple(CITYSCAPES.values())), classes=tuple(CITYSCAPES)
    ),
    'nyuv2': dict(meaning=dict(depth_scale=1 / 1000)),
    'kitti': dict(meaning=dict(depth_scale=1 / 256)),
}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a folder.

    Attributes:
      layout: a name of LAYOUTS, or ''.
      maps: {image: {'segmentation' or 'depth': its map}}.
      alone: images without a map.
      splits: {split: its images} where other things than folders say it, else None.
      meaning: of the values in the maps, as keyword arguments of `maps.Meaning`.
      classes: names of the classes of the maps, if known.
    """

    layout: str
    maps: dict[str, dict[str, str]]
    alone: list[str] = dataclasses.field(default_factory=list)
    splits: dict[str, list[str]] | None = None
    meaning: dict = dataclasses.field(default_factory=dict)
    classes: tuple | None = None


def find(
    names: list[str], layout: str | None, where: str, read_text: Callable[[str], str | None]
) -> Pairs | None:
    """The pairs among the files of a folder; None if there are none and no layout is asked for.

    Args:
      names: of images and maps.
      layout: a name of LAYOUTS; None: what the names say.
      where: the folder, for messages.
      read_text: of a name, the content of a text file, or None if there is none.

    Raises:
      UserError: there is no pair, where there should be some.
    """
    if layout is not None and layout not in LAYOUTS:
        raise errors.UserError(f'There is no layout {layout!r}{errors.nearest(layout, LAYOUTS)}')
    for name, function in LAYOUTS.items():
        if layout in (None, name) and (found := function(names, read_text, layout == name)):
            return _complete(found)
    if layout is not None:
        raise errors.UserError(
            f'{where} has no image with a map where layout={layout!r} has them: '
            f'see docs/maps.md for its folders.'
        )
    found = _by_folders(names)
    if found is None or found.maps:
        return found and _complete(found)
    used = sorted({part for name in names for part in name.split('/')[:-1] if _role(part)})
    raise errors.UserError(
        f'{where} has the folders {", ".join(used)}, but no file of maps is named as an image: '
        f'give both the same name but for the extension, or give the folder of images alone.'
    )


def given(names: list[str], kind_names: dict[str, dict[str, str]], where: str) -> Pairs:
    """The pairs of images `names` with maps in folders that the user names.

    Args:
      names: of images.
      kind_names: {'segmentation' or 'depth': {name without extension: path of the map}}.
      where: the images, for messages.
    """
    stems = {name: os.path.splitext(name)[0] for name in names}
    found = {
        n: {kind: known[stem] for kind, known in kind_names.items() if stem in known}
        for n, stem in stems.items()
    }
    pairs = Pairs('', {n: m for n, m in found.items() if m}, [n for n, m in found.items() if not m])
    if not pairs.maps:
        folders = ' or '.join(kind_names)
        raise errors.UserError(
            f'None of the {len(names):,} images of {where} has a map in the folder {folders}: '
            f'maps have the same relative names but for the extension.'
        )
    return _complete(pairs)


def listed(names: list[str], text: str, file: str, kind: str, layout: str | None) -> Pairs:
    """The pairs of a list with 'IMAGE MAP' in each line; of depth 'None' is no map.

    Paths may start at some folder below the root, such as `sync/` of NYUv2.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or min(map(len, lines)) < 2:
        raise errors.UserError(f'{file} must have an image and its map in each line.')
    known = set(names)
    columns = []
    for column in range(2):
        paths = [line[column].lstrip('/') for line in lines]
        first = next((p for p in paths if p != 'None'), '')
        starts = [n[: -len(first)] for n in names if n == first or n.endswith(f'/{first}')]
        if len(starts) != 1:
            raise errors.UserError(
                f'{file} names {first!r}, and {len(starts)} files end so: give paths relative to '
                f'the folder of the data.'
            )
        columns.append([p if p == 'None' else starts[0] + p for p in paths])
    pairs = dict(zip(*columns, strict=True))
    for name in (n for pair in pairs.items() for n in pair if n != 'None'):
        if name not in known:
            raise errors.UserError(f'{file} names {name!r}, which is missing: correct the list.')
    alone = [image for image, found in pairs.items() if found == 'None']
    found = {image: {kind: own} for image, own in pairs.items() if own != 'None'}
    return Pairs(layout or '', found, alone, **_KNOWN.get(layout, {}))


def _complete(pairs):
    """Only images that have all kinds of maps that there are, so that batches are alike."""
    kinds = {kind for found in pairs.maps.values() for kind in found}
    whole = {i: found for i, found in pairs.maps.items() if len(found) == len(kinds)}
    if not whole:
        raise errors.UserError('No image has both a class map and a depth map: give one folder.')
    alone = pairs.alone + [i for i in pairs.maps if i not in whole]
    return dataclasses.replace(pairs, maps=whole, alone=alone)


def _role(part):
    """('image' or a kind of map, its rank, split) of a folder such as `masks` or `train_masks`.

    None for another folder.
    """
    part = part.lower()
    for name in (part, *part.replace('-', '_').split('_')):
        if name in IMAGES or name in KIND:
            rest = part.replace(name, '', 1).strip('_-')
            if not rest or splits.role(rest):
                return ('image' if name in IMAGES else KIND[name]), _RANK.get(name), rest
    return None


def _by_folders(names):
    """Pairs by the names of folders; without any pair if a folder of each sort lies side by side.

    None if no folder of maps lies beside one of images.
    """
    places, sides = {}, {}  # folder -> (folders above and split, role, rank, folders below)
    for parent in {name.rpartition('/')[0] for name in names}:
        parts = parent.split('/')
        at = next((k for k, part in enumerate(parts) if _role(part)), None)
        if at is not None:
            role, order, split = _role(parts[at])
            top = (*parts[:at], split)
            places[parent] = top, role, order, tuple(parts[at + 1 :])
            sides.setdefault(top, set()).add(role)
    if not any('image' in roles and len(roles) > 1 for roles in sides.values()):
        return None
    for levels in (True, False):  # annotations/trimaps/a.png of images/a.jpg: any folder below
        images, found, ambiguous = {}, {}, set()  # key -> names; role -> key -> (rank, name)
        for name in names:
            parent, _, base = name.rpartition('/')
            if parent not in places:
                continue
            top, role, place, below = places[parent]
            key = (top, below if levels else (), os.path.splitext(base)[0])
            if role != 'image':
                order = place, rank(base)
                known = found.setdefault(role, {}).setdefault(key, (order, name))
                if known[0][0] == place and places[known[1].rpartition('/')[0]] != places[parent]:
                    ambiguous.add(key)
                if order < known[0]:
                    found[role][key] = order, name
            elif files.is_image(base):
                images.setdefault(key, []).append(name)
        pairs, alone = {}, []
        for key, own in images.items():
            known = {kind: by_key[key][1] for kind, by_key in found.items() if key in by_key}
            for name in own:
                if known and (levels or len(own) == 1) and key not in ambiguous:
                    pairs[name] = known
                else:
                    alone.append(name)
        if pairs:
            break
    return Pairs('', pairs, alone)


def rank(name: str) -> int:
    """The preferred of two maps of one image has the lower."""
    extension = os.path.splitext(name)[1].lower()
    return maps.EXTENSIONS.index(extension) if extension in maps.EXTENSIONS else 99


# Layouts: functions of (names, read_text, whether the user names the layout) that return Pairs, or
# None where the files are others.


def _ade20k(names, read_text, asked):
    """images/{training,validation}/ADE_*.jpg and annotations/{training,validation}/ADE_*.png."""
    own = names if asked else [n for n in names if '/ADE_' in n]
    found = _by_folders(own) if own else None
    if not found or not found.maps:
        return None
    top = next(iter(found.maps)).rpartition('images/')[0]
    table = read_text(f'{top}objectInfo150.txt') or ''
    classes = [line.split('\t')[-1].strip() for line in table.splitlines()[1:] if line.strip()]
    known = dict(_KNOWN['ade20k'])
    if len(classes) == 150:
        known['classes'] = tuple(classes)
    return dataclasses.replace(found, layout='ade20k', **known)


def _voc(names, read_text, asked):
    """JPEGImages, SegmentationClass (SegmentationClassAug), ImageSets/Segmentation/*.txt."""
    tops = sorted({n[: n.index('JPEGImages/')] for n in names if 'JPEGImages/' in n})
    own = [n for n in names if any(n.startswith(top) for top in tops)] if tops else []
    found = _by_folders(own)
    if not found or not found.maps:
        return None
    by_split = {}
    known = {os.path.splitext(n)[0]: n for n in found.maps}
    for split in ('train', 'val', 'test', 'trainval', 'train_aug', 'trainaug'):
        for top in tops:
            text = read_text(f'{top}ImageSets/Segmentation/{split}.txt')
            ids = [f'{top}JPEGImages/{line.split()[0]}' for line in (text or '').splitlines()]
            own = [known[i] for i in ids if i in known]
            if own:
                by_split[split] = by_split.get(split, []) + own
    if not by_split:
        return None
    return dataclasses.replace(found, layout='voc', splits=by_split, **_KNOWN['voc'])


def _cityscapes(names, read_text, asked):
    """leftImg8bit/{train,val}/city/X_leftImg8bit.png and gtFine/.../X_gtFine_labelIds.png."""
    images, ids, train_ids = {}, {}, {}
    for name in names:
        for found, folder, ending in (
            (images, 'leftImg8bit/', '_leftImg8bit.png'),
            (ids, 'gtFine/', '_gtFine_labelIds.png'),
            (train_ids, 'gtFine/', '_gtFine_labelTrainIds.png'),
        ):
            if name.endswith(ending):
                found[name.removesuffix(ending).split(folder)[-1]] = name
    # The maps of `test` are blank: its labels are not public.
    labels = {k: n for k, n in (ids or train_ids).items() if not k.startswith('test/')}
    pairs = {image: {'segmentation': labels[k]} for k, image in images.items() if k in labels}
    if not pairs:
        return None
    by_split = {}
    for key, image in images.items():
        if key in labels:
            by_split.setdefault(key.split('/')[0], []).append(image)
    alone = [image for key, image in images.items() if key not in labels]
    known = _KNOWN['cityscapes'] if ids else {'classes': tuple(CITYSCAPES)}
    return Pairs('cityscapes', pairs, alone, by_split, **known)


def _nyuv2(names, read_text, asked):
    """sync/SCENE/{rgb_*.jpg,sync_depth_*.png}, official_splits/test/SCENE/..."""
    own = [n for n in names if '/rgb_' in n or '/sync_depth_' in n]
    known, pairs, alone, by_split = set(own), {}, [], {}
    for name in own:
        folder, base = os.path.split(name)
        found = re.fullmatch(r'rgb_(\d+)\.(jpg|png)', base)
        if not found:
            continue
        depth = os.path.join(folder, f'sync_depth_{found[1]}.png')
        if depth not in known:
            alone.append(name)
            continue
        pairs[name] = {'depth': depth}
        split = re.search(r'(?:^|/)official_splits/(\w+)/', name)
        by_split.setdefault(split[1] if split else 'sync', []).append(name)
    if not pairs:
        return None
    if 'sync' in by_split:  # of the official images for training few lie there, in sync/ all
        by_split = {
            'official_train': by_split.pop('train', []),
            'train': by_split.pop('sync'),
            **by_split,
        }
    by_split = {k: v for k, v in by_split.items() if v}
    return Pairs('nyuv2', pairs, alone, by_split, **_KNOWN['nyuv2'])


_KITTI_IMAGE = re.compile(r'(?:^|/)(\w+_sync/image_0[23])/data/(\d+)\.(?:png|jpg)$')
_KITTI_DEPTH = re.compile(
    r'(?:(?:^|.*/)(train|val)/)?(?:.*/)?(\w+_sync)/proj_depth/groundtruth/(image_0[23])/(\d+)\.png$'
)


def _kitti(names, read_text, asked):
    """DATE/DRIVE/image_02/data/N.png and [train|val/]DRIVE/proj_depth/groundtruth/image_02/N.png.

    Without these splits a list of pairs gives Eigen's.
    """
    depths, images = {}, {}
    for name in (n for n in names if '_sync/' in n):
        if found := _KITTI_DEPTH.match(name):
            split, drive, camera, number = found.groups()
            depths[f'{drive}/{camera}', number] = split, name
        elif found := _KITTI_IMAGE.search(name):
            images[found[1], found[2]] = name
    pairs = {image: {'depth': depths[k][1]} for k, image in images.items() if k in depths}
    if not pairs:
        return None
    by_split = {}
    for key, image in images.items():
        if key in depths and depths[key][0]:
            by_split.setdefault(depths[key][0], []).append(image)
    alone = [image for key, image in images.items() if key not in depths]
    return Pairs('kitti', pairs, alone, by_split or None, **_KNOWN['kitti'])


LAYOUTS = {
    'ade20k': _ade20k,
    'voc': _voc,
    'cityscapes': _cityscapes,
    'nyuv2': _nyuv2,
    'kitti': _kitti,
}
