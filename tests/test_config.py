# SPDX-License-Identifier: Apache-2.0
"""Configs are complete, typed and checked, and recipes change only where a review sees it."""

import functools
import json
import os
import pathlib

import jax
import pytest

from ssl_jax import config, methods
from ssl_jax.run import clock, trees

RECORDED = pathlib.Path(__file__).parent / 'recipes.json'
UPDATE = 'if that is meant, run SSL_JAX_UPDATE_GOLDEN=1 pytest tests/test_config.py and commit it'


def plain(**changes):
    """A valid config with `changes` (dots as __)."""
    c = config.default()
    c.total_steps = 100
    config.fill_size(c.method)
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


def entries():
    """{name: {field: value}}: what each recipe changes of its method's default, then the defaults.

    Of the default of a method its own fields alone: the others are those of `default()`.
    """
    found = {}
    for name in config.recipes():
        c = config.load(name)
        default = trees.dotted(config.default(c.method.name))
        fields = {k: v for k, v in trees.dotted(c).items() if v != default.get(k, ...)}
        found[name] = {**fields, 'method.name': c.method.name}
    default = trees.dotted(config.default())
    found['default()'] = {k: v for k, v in default.items() if not k.startswith('method.')}
    for name in methods.names():
        own = trees.dotted({'method': config.default(name).method})
        found[f"default('{name}')"] = own
    return {name: dict(sorted(fields.items())) for name, fields in found.items()}


ENTRIES = [*config.recipes(), 'default()', *(f"default('{name}')" for name in methods.names())]


@pytest.fixture(scope='module')
def now():
    """`entries` as JSON has them, also written to RECORDED where that is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('SSL_JAX_DATA', raising=False)
        found = entries()
    if os.environ.get('SSL_JAX_UPDATE_GOLDEN'):
        RECORDED.write_text(json.dumps(found, indent=1, default=dict) + '\n')
    return json.loads(json.dumps(found, default=dict))


@functools.cache
def recorded():
    return json.loads(RECORDED.read_text())


@pytest.mark.parametrize('name', ENTRIES)
def test_a_recipe_or_default_is_as_recorded(name, now):
    def written(fields):  # 1 and 1.0 differ
        return {k: json.dumps(v) for k, v in fields.items()}

    assert written(now[name]) == written(recorded().get(name, {})), UPDATE


def test_nothing_is_recorded_that_is_not_there(now):
    assert list(recorded()) == ENTRIES, UPDATE


@pytest.mark.parametrize('name', config.recipes())
def test_a_recipe_takes_away_no_field_of_its_method_and_adds_none(name):
    def fields(c):
        return {k for k in config.flatten(c) if not k.startswith(config.OPEN)}

    recipe = config.load(name)
    assert fields(recipe) == fields(config.default(recipe.method.name))
    assert list(recipe.eval.tasks) == list(config.default().eval.tasks)  # None turns one off


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
    method = methods.make(config.load(name))
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
        ('eval.tasks.knn.ks=(1, 5)', (1, 5)),
        ('eval.tasks.knn.ks=[1]', (1,)),
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
        ('method.crop_scale=10', "'method.crop_scale' takes tuple, not '10': write "),
        ('optim=adam', "'optim' is a group; set one of its fields"),
        ('method.name=dinov2', 'start from a recipe of that method, such as images_dinov2.'),
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


def test_evaluations_take_any_option_and_none():
    c = changed('eval.tasks.pictures=None', 'eval.tasks.knn.ks=[5]', 'eval.tasks.mine.share=0.5')
    tasks = c.eval.tasks.to_dict()
    assert tasks == dict(
        accuracy={}, knn=dict(ks=(5,)), mine=dict(share=0.5), monitors={}, pictures=None, seg={}
    )


def test_loaded_config_is_locked_but_for_its_sources_and_evaluations():
    c = changed()
    with pytest.raises((KeyError, AttributeError)):
        c.optim.momentum = 0.9
    with pytest.raises((KeyError, AttributeError)):
        c.eval.share = 0.5
    c.data.train.note = 'free'
    c.eval.tasks.knn.share = 0.5


def test_json_keeps_every_value_and_type():
    c = changed("optim.lr_mult=(('patch_embed', 0.2),)")
    again, lines = config.from_dict(json.loads(config.to_json(c)))
    assert lines == []
    assert config.diff(c, again) == {}
    assert again.optim.lr_mult == (('patch_embed', 0.2),)
    assert again.is_locked


def test_json_is_plain_and_sorted():
    values = json.loads(config.to_json(changed()))
    assert list(values) == sorted(values)


def test_diff_lists_what_differs():
    found = config.diff(changed(), changed('seed=1'))
    assert found == {'overrides': ((), ('seed=1',)), 'seed': (0, 1)}


# Configs of earlier versions


def stored(recipe='mae_vitb16', **changes):
    """A config as JSON has it, with `changes` (dots as __); a change to ... takes a field away."""
    values = json.loads(config.to_json(config.load(recipe)))
    for name, value in changes.items():
        *groups, key = name.split('__')
        parent = values
        for group in groups:
            parent = parent[group]
        parent.pop(key, None)
        if value is not ...:
            parent[key] = value
    return values


def test_fields_that_a_stored_config_lacks_get_their_defaults_and_are_listed():
    c, lines = config.from_dict(stored(seed=..., method__flip=..., checkpoint__keep=5))
    assert (c.seed, c.method.flip, c.checkpoint.keep) == (0, 0.5, 5)
    assert c.is_locked
    assert lines == [
        'method.flip = 0.5: not in the stored config, the default',
        'seed = 0: not in the stored config, the default',
    ]


def test_a_whole_group_may_be_missing():
    c, lines = config.from_dict(stored(nonfinite=...))
    assert c.nonfinite.to_dict() == dict(in_a_row=3, total=10)
    assert [line.partition(' ')[0] for line in lines] == ['nonfinite.in_a_row', 'nonfinite.total']


def test_a_field_that_is_gone_is_dropped_where_its_value_is_that_of_the_code():
    c, lines = config.from_dict(stored(method__crop_ratio=[3 / 4, 4 / 3]))
    assert 'crop_ratio' not in c.method and lines == []
    assert config.diff(c, config.load('mae_vitb16')) == {}


def test_a_field_that_is_gone_with_another_value_is_a_line():
    _, lines = config.from_dict(stored(method__crop_ratio=[1.0, 1.0]))
    assert lines == [
        f'method.crop_ratio = (1.0, 1.0) is no field any more, this version has ({3 / 4}, {4 / 3})'
    ]


def test_a_stored_value_of_another_type_is_one_sentence():
    with pytest.raises(ValueError, match="the stored config has batch_size='big'"):
        config.from_dict(stored(batch_size='big'))


@pytest.mark.parametrize('changes, message', [
    (dict(method__mask_ration=0.5), "'method.mask_ratio'?"),
    (dict(batchsize=3), "'batch_size'?"),
    (dict(optim__base_rate=1e-3), "'optim.base_lr'?"),
])  # fmt: skip
def test_an_unknown_field_of_a_stored_config_is_one_sentence_with_the_nearest(changes, message):
    with pytest.raises(ValueError) as error:
        config.from_dict(stored(**changes))
    (field,) = changes
    assert f'the stored config has {field.replace("__", ".")}=' in str(error.value)
    assert f'which this version does not know: did you mean {message}' in str(error.value)
    assert '\n' not in str(error.value)


def test_every_field_that_is_gone_has_a_value_that_is_dropped():
    for name in methods.names():
        for field, value in methods.get(name).removed.items():
            values = config.default(name).to_dict()
            values['method'][field] = 1 if value is ... else value
            assert config.from_dict(values)[1] == [], (name, field)


def test_evaluations_that_were_fields_of_eval_become_tasks():
    old = dict(knn=True, knn_k=[5], temperature=0.1, pictures=False, num_pictures=4)
    values = stored()
    del values['eval']['tasks']
    values['eval'].update(old)
    c, lines = config.from_dict(values)
    assert c.eval.tasks.to_dict() == dict(
        accuracy={}, knn=dict(ks=(5,), temperature=0.1), monitors={}, pictures=None
    )
    assert lines == []


@pytest.mark.parametrize(
    'recipe, form', [('scenes_distill', 'features'), ('dinov2_vitb14_distill', 'dino')]
)
def test_the_two_forms_of_distillation_became_two_methods(recipe, form):
    values = stored(recipe, method__name='distill', method__form=form)
    c, lines = config.from_dict(values)
    assert config.diff(c, config.load(recipe)) == {} and lines == []


def test_a_stored_config_of_an_encoder_alone_has_no_method():
    values = stored(method=...)
    c, lines = config.from_dict(values)
    assert 'method' not in c and lines == []


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
        (dict(method__mask_ratio=0.0), 'method.mask_ratio=0 hides no patch'),
        (dict(method__drop_path=-0.1), 'method.drop_path=-0.1 is out of range'),
        (dict(method__flip=2.0), 'method.flip=2.0 is out of range: use a value from 0.0 to 1.0'),
        (
            dict(method__crop_scale=(1.0, 0.2)),
            'must be fractions of the area, 0 < low <= high <= 1',
        ),
        (
            dict(method__crop_scale=(0.2, 2.0)),
            'must be fractions of the area, 0 < low <= high <= 1',
        ),
        (dict(method__crop_scale=(0.2,)), 'must be fractions of the area, 0 < low <= high <= 1'),
        (dict(init_from='a', resume_from='b'), 'init_from (weights only) and resume_from'),
        (dict(dtype='float16'), "dtype='float16' is unknown: use one of float32, bfloat16."),
        (dict(remat='some'), "remat='some' is unknown: use one of none, dots, full."),
        (dict(mesh__tensor=-1), 'for one axis or for data and fsdp'),
        (dict(mesh__tensor=0), 'must have positive sizes'),
        (dict(total_epochs=2.0), 'total_steps=100 and total_epochs=2.0 contradict each other'),
        (dict(total_steps=None), 'None of total_steps, total_epochs, total_examples is set'),
        (dict(total_steps=-5), 'total_steps=-5 is negative'),
        (dict(warmup_steps=100), 'warmup_steps=100 does not end before total_steps=100'),
        (
            dict(optim__freeze='head'),
            "optim.freeze='head' must be a tuple, with a comma: ('head',).",
        ),
        (dict(optim__warm_freeze=('^encoder',)), "warm_freeze=('^encoder',) has no length: set"),
        (dict(optim__warm_freeze_steps=5), "freezes nothing: set optim.warm_freeze=('^encoder',)."),
        (
            dict(optim__warm_freeze=('^encoder',), optim__warm_freeze_steps=100),
            'optim.warm_freeze_steps=100 does not end before total_steps=100',
        ),
        (dict(eval__batch_size=0), 'eval.batch_size=0 is out of range: use a value from 1 to'),
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
    methods.make(c)
    assert c.is_locked and not c.infer
    assert c.batch_size % devices == 0
    if 'group_size' in c.method:  # each device has whole groups
        assert c.batch_size // devices % c.method.group_size == 0
    assert c.method.img_size <= max(min(hw), 2 * c.method.patch_size)
    assert clock.Clock.of(c, num_images).total > 0
    assert len(decisions) > 8


@pytest.mark.parametrize('recipe', INFERRED)
def test_inferred_run_on_a_cpu_lasts_minutes(recipe):
    c, _ = config.infer(config.load(recipe), *PLACES['street scenes on two cores'])
    steps = clock.Clock.of(c, 367).total
    flops = steps * methods.make(c).flops(c.batch_size)
    assert 60 < flops / (2 * config.CPU_FLOPS) < 600
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
