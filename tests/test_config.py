# SPDX-License-Identifier: Apache-2.0
"""Configs are complete, typed and checked, and recipes change only where a review sees it."""

import json
import os
import pathlib

import ml_collections
import pytest

from ssl_jax import (
    config,
    config_dinov2,
    config_distill,
    config_finetune,
    config_splitmask,
    methods,
)

GOLDEN = pathlib.Path(__file__).parent / 'golden_configs'


def plain(**changes):
    """A valid config with `changes` (dots as __)."""
    c = config.default()
    c.total_steps = 100
    config.config_infer.fill_size(c.method)
    with c.ignore_type():
        for name, value in changes.items():
            *groups, key = name.split('__')
            parent = c
            for group in groups:
                parent = parent[group]
            parent[key] = value
    return c


def changed(*overrides, recipe='mae_vitb16'):
    return config.load(recipe, overrides)


# Recipes


@pytest.mark.parametrize('name', config.recipes())
def test_recipe_equals_its_golden_json(name, monkeypatch):
    monkeypatch.delenv('SSL_JAX_DATA', raising=False)
    text, path = config.to_json(config.load(name)), GOLDEN / f'{name}.json'
    if os.environ.get('SSL_JAX_UPDATE_GOLDEN'):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    how = 'SSL_JAX_UPDATE_GOLDEN=1 pytest tests/test_config.py'
    assert path.exists(), f'{name} has no {path.name}: run {how} and commit it'
    difference = config.diff(config.from_json(path.read_text()), config.from_json(text))
    assert not difference, (
        f'{path.name} and {name} differ in {difference}: if that is meant, run {how} and commit it'
    )
    assert text == path.read_text()


def test_every_golden_json_has_its_recipe():
    assert sorted(path.stem for path in GOLDEN.glob('*.json')) == config.recipes()


@pytest.mark.parametrize('name', config.recipes())
def test_recipe_knows_no_field_that_default_does_not_know(name):
    def fields(c):
        return {k for k in config.flatten(c) if not k.startswith(config.SOURCES)}

    known = config.default()
    recipe = config.load(name)
    known.method = {
        'mae': lambda: known.method,
        'dinov2': config_dinov2.method,
        'distill': lambda: getattr(config_distill, recipe.method.form)(),
        'splitmask': config_splitmask.splitmask,
        'beit': config_splitmask.beit,
        'classifier': config_finetune.classifier,
    }[recipe.method.name]()
    assert fields(recipe) == fields(known)


@pytest.mark.parametrize('name', config.recipes())
def test_recipe_is_named_after_its_file_and_says_how_to_run_it(name):
    assert config.load(name).name == name
    text = (config.folder() / f'{name}.py').read_text()
    assert 'Command:\n' in text
    assert 'Cost: ' in text


@pytest.mark.parametrize(
    ('name', 'millions'),
    [('mae_vitb16', 111.66), ('mae_vitl16', 329.24), ('mae_vith14', 656.61),
     ('pixio_vith16', 733.08), ('pixio_vit1b16', 1463.71), ('pixio_vit5b16', 5543.92)],
)  # fmt: skip
def test_recipe_has_the_parameters_of_the_official_model(name, millions):
    import jax

    method = methods.from_config(config.load(name))
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    assert count == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ('name', 'lr'), [('mae_vitb16', 2.4e-3), ('pixio_vith16', 8e-4), ('pixio_vit5b16', 8e-4)]
)
def test_recipe_has_the_peak_learning_rate_of_the_paper(name, lr):
    c = config.load(name)
    assert c.optim.base_lr * c.batch_size / c.optim.scale_batch == pytest.approx(lr)


def test_argument_of_a_recipe_is_the_folder_of_its_images():
    c = config.load('mae_vitb16:gs://bucket/imagenet')
    assert c.data.train.to_dict() == dict(
        source='folder', path='gs://bucket/imagenet', split='train'
    )
    assert c.data.eval_test.split == 'val'


def test_recipe_is_found_by_path_and_by_name():
    by_path = config.load(config.folder() / 'mae_vitb16.py')
    assert config.to_json(by_path) == config.to_json(config.load('mae_vitb16'))


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="no recipe 'mae_vitb14': did you mean 'mae_vit[bh]1"):
        config.load('mae_vitb14')


def test_missing_recipe_file_names_the_path():
    with pytest.raises(ValueError, match="no recipe file '/nowhere/x.py'"):
        config.load('/nowhere/x.py')


# Overrides


@pytest.mark.parametrize(
    ('override', 'value'),
    [
        ('batch_size=1024', 1024),
        ('batch_size=1e3', 1000),
        ('optim.base_lr=1', 1.0),
        ('optim.base_lr=1e-3', 1e-3),
        ('optim.clip=3', 3.0),
        ('optim.clip=None', None),
        ('log.wandb=true', True),
        ('log.wandb=False', False),
        ('dtype=float32', 'float32'),
        ('name=7', '7'),
        ('eval.knn_k=(1, 5)', (1, 5)),
        ('eval.knn_k=[1]', (1,)),
        ('method.crop_scale=0.5,1.0', (0.5, 1.0)),
        ("optim.lr_mult=(('patch_embed', 0.2),)", (('patch_embed', 0.2),)),
        ('init_from=gs://bucket/run', 'gs://bucket/run'),
        ('config.seed=3', 3),
    ],
)
def test_override_is_read_by_the_type_of_its_field(override, value):
    name = override.partition('=')[0].removeprefix('config.')
    got = config.flatten(changed(override))[name]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('batch_size=big', "'batch_size' takes int or None, not 'big': write batch_size=100."),
        ('seed=1.5', "'seed' takes int, not '1.5'"),
        ('seed=1e999', "'seed' takes int, not '1e999'"),
        ('seed=None', "'seed' takes int, not 'None'"),
        ('seed=True', "'seed' takes int, not 'True'"),
        ('optim.b2=True', "'optim.b2' takes float, not 'True'"),
        ('log.wandb=1', "'log.wandb' takes bool, not '1': write log.wandb=True."),
        ('eval.knn_k=10', "'eval.knn_k' takes tuple, not '10'"),
        ('optim=adam', "'optim' is a group; set one of its fields"),
        ('batch_size', "Override 'batch_size' has no '=': write a.b=value."),
        ('batchsize=1', "no field 'batchsize': did you mean 'batch_size'?"),
        ('optim.basel_r=1', "no field 'optim.basel_r': did you mean 'optim.base_lr'?"),
        ('base_lr=1', "no field 'base_lr': did you mean 'optim.base_lr'?"),
        ('method.mask.ratio=1', "no field 'method.mask.ratio': did you mean 'method.mask_ratio'?"),
        ('method.size=XXL', "method.size='XXL' is unknown: use one of Ti, S, B, L"),
    ],
)
def test_wrong_override_is_one_sentence_that_says_what_to_write(override, message):
    with pytest.raises(ValueError) as error:
        changed(override)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_one_unit_of_a_duration_clears_its_siblings():
    c = changed('total_steps=10', 'warmup_examples=1e4', 'eval.every_steps=5')
    assert (c.total_steps, c.total_epochs, c.total_examples) == (10, None, None)
    assert (c.warmup_steps, c.warmup_epochs, c.warmup_examples) == (None, None, 10_000)
    assert (c.eval.every_steps, c.eval.every_epochs) == (5, None)


def test_clearing_one_unit_keeps_its_siblings():
    assert changed('total_steps=None').total_epochs == 800


def test_saving_by_steps_and_by_minutes_go_together():
    c = changed('checkpoint.every_steps=5')
    assert c.checkpoint.every_minutes == 15


def test_size_sets_the_widths_and_later_overrides_win():
    c = changed('method.size=L')
    assert (c.method.embed_dim, c.method.depth, c.method.num_heads) == (1024, 24, 16)
    c = changed('method.size=L', 'method.depth=2')
    assert (c.method.embed_dim, c.method.depth) == (1024, 2)
    c = changed('method.size=S', recipe='scenes_mae')
    assert c.method.embed_dim == 384


def test_sources_take_any_key_and_a_bare_path():
    c = changed('data.train.n=7', 'data.eval_test.path=/x', recipe='scenes_mae')
    assert (c.data.train.n, c.data.eval_test.path) == (7, '/x')
    assert changed('data.train=2024').data.train == '2024'
    assert changed('data.eval_train=None').data.eval_train is None
    c = changed('data.eval_train.path=/y', recipe='images_mae')
    assert c.data.eval_train.to_dict() == {'path': '/y'}


def test_loaded_config_is_locked_but_for_its_sources():
    c = changed()
    with pytest.raises((KeyError, AttributeError)):
        c.optim.momentum = 0.9
    c.data.train.note = 'free'


def test_json_keeps_every_value_and_type():
    c = changed("optim.lr_mult=(('patch_embed', 0.2),)")
    again = config.from_json(config.to_json(c))
    assert config.diff(c, again) == {}
    assert again.optim.lr_mult == (('patch_embed', 0.2),)
    assert again.is_locked


def test_json_is_plain_and_sorted():
    values = json.loads(config.to_json(changed()))
    assert list(values) == sorted(values)


def test_diff_lists_what_differs():
    assert config.diff(changed(), changed('seed=1')) == {'seed': (0, 1)}


# Units


@pytest.mark.parametrize(
    ('field', 'value', 'steps'),
    [('total_steps', 7, 7), ('total_epochs', 2.0, 20), ('total_examples', 95, 10),
     ('total_epochs', 0.001, 1), ('total_epochs', 0.0, 0)],
)  # fmt: skip
def test_steps_converts_every_unit(field, value, steps):
    c = ml_collections.ConfigDict({field: value})
    assert config.steps('total', c, num_examples=100, batch_size=10) == steps


def test_steps_of_the_imagenet_recipe_are_those_of_800_passes():
    c = changed()
    steps = config.steps('total', c, num_examples=1_281_167, batch_size=c.batch_size)
    assert steps == round(800 * 1_281_167 / 4096) == 250_228


def test_steps_without_a_unit_is_the_default_or_an_error():
    c = config.default()
    assert config.steps('warmup', c, default=0) == 0
    with pytest.raises(ValueError, match='None of total_steps, total_epochs, total_examples'):
        config.steps('total', c)


def test_steps_of_two_units_is_an_error():
    c = ml_collections.ConfigDict(dict(total_steps=1, total_epochs=2.0))
    with pytest.raises(ValueError, match='total_steps=1 and total_epochs=2.0 contradict'):
        config.steps('total', c, num_examples=100, batch_size=10)


def test_steps_in_epochs_of_an_endless_source_is_an_error():
    c = ml_collections.ConfigDict(dict(total_epochs=2.0))
    with pytest.raises(ValueError, match='total_epochs needs the number of images'):
        config.steps('total', c, batch_size=10)
    with pytest.raises(ValueError, match='total_epochs needs the batch size'):
        config.steps('total', c, num_examples=10)


# Checks


def test_default_with_a_length_is_valid():
    config.validate(plain())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(accum_steps=3), 'not divisible by accum_steps=3: use batch_size=255'),
        (dict(accum_steps=0), 'accum_steps=0 must be positive'),
        (dict(batch_size=None), 'batch_size=None'),
        (dict(method__img_size=225), 'not a multiple of method.patch_size=16: use img_size=224.'),
        (dict(method__mask_grid=4), 'does not divide the 14x14 token grid'),
        (dict(method__mask_grid=14), 'leaves none of the 1 mask cells visible'),
        (dict(method__embed_dim=100), 'embed_dim=100 is not divisible by method.num_heads=6'),
        (dict(method__embed_dim=90), "divisible by 4, which pos_embed='sincos' needs: use 88"),
        (dict(method__decoder_num_heads=7), 'method.decoder_embed_dim=512 is not divisible by'),
        (dict(method__embed_dim=None), "method.embed_dim is None: set it, or use method.size='S'"),
        (dict(method__pos_embed='rope'), "method.pos_embed='rope' is unknown"),
        (dict(method__mask_ratio=1.0), 'method.mask_ratio=1.0 is out of range'),
        (dict(method__drop_path=-0.1), 'method.drop_path=-0.1 is out of range'),
        (dict(method__flip=2.0), 'method.flip=2.0 is out of range: use a value from 0.0 to 1.0'),
        (dict(method__crop_scale=(1.0, 0.2)), 'must be (low, high) with 0 < low <= high'),
        (dict(method__crop_scale=(0.2, 2.0)), 'are fractions of the area'),
        (dict(init_from='a', resume_from='b'), 'init_from (weights only) and resume_from'),
        (dict(dtype='float16'), "dtype='float16' is unknown: use one of float32, bfloat16."),
        (dict(remat='some'), "remat='some' is unknown: use one of none, dots, full."),
        (dict(mesh__tensor=-1), 'for one axis or for data and fsdp'),
        (dict(mesh__tensor=0), 'must have positive sizes'),
        (dict(total_epochs=2.0), 'total_steps=100 and total_epochs=2.0 contradict each other'),
        (dict(total_steps=None), 'None of total_steps, total_epochs, total_examples is set'),
        (dict(total_steps=-5), 'total_steps=-5 is negative'),
        (dict(warmup_steps=100), 'warmup_steps=100 does not end before total_steps=100'),
        (dict(eval__knn_k=10), 'eval.knn_k=10 must be a tuple, with a comma: (10,).'),
        (dict(optim__freeze='head'), "optim.freeze='head' must be a tuple"),
        (dict(optim__warm_freeze=('^encoder',)), "warm_freeze=('^encoder',) has no length: set"),
        (dict(optim__warm_freeze_steps=5), "freezes nothing: set optim.warm_freeze=('^encoder',)."),
        (
            dict(optim__warm_freeze=('^encoder',), optim__warm_freeze_steps=100),
            'optim.warm_freeze_steps=100 does not end before total_steps=100',
        ),
        (dict(eval__temperature=0.0), 'eval.temperature=0.0 is out of range'),
        (dict(optim__b2=1.0), 'optim.b2=1.0 is out of range'),
        (dict(optim__layer_decay=1.5), 'optim.layer_decay=1.5 is out of range'),
    ],
)
def test_contradiction_is_one_sentence_that_says_what_to_change(changes, message):
    with pytest.raises(ValueError) as error:
        config.validate(plain(**changes))
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_load_checks_after_the_overrides():
    with pytest.raises(ValueError, match='not a multiple of method.patch_size=14'):
        changed('method.patch_size=14', 'method.img_size=225')


# Choices


PLACES = {
    'street scenes on two cores': (367, (360, 480), 'cpu', 1, 2),
    'thumbnails on two cores': (50_000, (32, 32), 'cpu', 1, 2),
    'a handful on two cores': (5, (700, 1000), 'cpu', 1, 2),
    'a handful on one GPU': (5, (700, 1000), 'gpu', 1, 16),
    'street scenes on eight GPUs': (367, (360, 480), 'gpu', 8, 64),
    'ImageNet on a pod': (1_281_167, (375, 500), 'tpu', 256, 200),
    'tiny images on a pod': (10**8, (20, 31), 'tpu', 256, 200),
}
INFERRED = [name for name in config.recipes() if name.startswith('images_')]


@pytest.mark.parametrize('recipe', INFERRED)
@pytest.mark.parametrize('place', PLACES)
def test_inferred_config_is_complete_and_valid_everywhere(recipe, place):
    num_images, hw, platform, devices, cores = PLACES[place]
    c, decisions = config.infer(config.load(recipe), *PLACES[place][:4], cores=cores)
    config.validate(c)
    methods.from_config(c)
    assert c.is_locked and not c.infer
    assert c.batch_size % devices == 0
    if 'group_size' in c.method:  # each device has whole groups
        assert c.batch_size // devices % c.method.group_size == 0
    assert c.method.img_size <= max(min(hw), 2 * c.method.patch_size)
    assert config.steps('total', c, num_images, c.batch_size) > 0
    assert len(decisions) > 8


@pytest.mark.parametrize('recipe', INFERRED)
def test_inferred_run_on_a_cpu_lasts_minutes(recipe):
    c, _ = config.infer(config.load(recipe), *PLACES['street scenes on two cores'])
    steps = config.steps('total', c, 367, c.batch_size)
    flops = steps * methods.from_config(c).flops(c.batch_size)
    assert 60 < flops / (2 * config.config_infer.CPU_FLOPS) < 600
    assert steps > 50


def test_inference_keeps_what_is_set_and_reports_only_what_it_chose():
    overrides = ('method.img_size=64', 'batch_size=8', 'total_steps=3', 'optim.lr=0.5')
    c, decisions = config.infer(
        config.load('images_mae', overrides), *PLACES['street scenes on two cores']
    )
    assert (c.method.img_size, c.batch_size, c.total_steps, c.optim.lr) == (64, 8, 3, 0.5)
    assert not [d for d in decisions if d.startswith(('method.img_size', 'batch_size', 'optim.lr'))]
    assert [d for d in decisions if d.startswith('method.patch_size = 8: ')]


def test_inference_leaves_its_argument_alone():
    c = config.load('images_mae')
    before = config.to_json(c)
    config.infer(c, *PLACES['street scenes on two cores'])
    assert config.to_json(c) == before


def test_more_images_get_a_larger_model():
    def depth_width(n):
        c, _ = config.infer(config.load('images_mae'), n, (500, 500), 'tpu', 8)
        return c.method.depth, c.method.embed_dim

    assert depth_width(1000) < depth_width(10**6) < depth_width(10**7)


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match='has no images'):
        config.infer(config.load('images_mae'), 0, (8, 8), 'cpu', 1)
