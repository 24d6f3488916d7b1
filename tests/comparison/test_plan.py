"""Plans of comparisons."""

import json

import pytest
from helpers.comparison import SEGMENTATION, SHAPE, TINY, config
from mmengine.config import Config, ConfigDict

from acmix_mm.comparison import plan as module
from acmix_mm.comparison.matching import BackboneSize, Family
from acmix_mm.comparison.plan import check_pretraining, check_settings, make_plan, match_all
from acmix_mm.comparison.schedule import Budget
from acmix_mm.comparison.timing import Latency, Spread
from acmix_mm.utils.errors import UsageError


@pytest.mark.parametrize(('mixers', 'message'), [
    (['acmix', 'mlp'], "There is no mixer 'mlp'; name one of conv"),
    (['acmix'], 'two or more different mixers'),
    (['acmix', 'acmix'], 'two or more different mixers, the reference first; got acmix acmix'),
])
def test_mixers_are_checked(mixers, message, shapes):
    with pytest.raises(UsageError, match=message):
        check_settings(config(SEGMENTATION, shapes), mixers)


def test_configs_are_checked(shapes):
    cfg = config(SEGMENTATION, shapes)
    with pytest.raises(UsageError, match='The backbone ResNet has no mixer to exchange'):
        Family(ConfigDict(backbone=dict(type='ResNet')), 'attn', SHAPE)
    with pytest.raises(UsageError, match='has no val_evaluator'):
        check_settings(config(SEGMENTATION, shapes, val_evaluator=None), ['acmix', 'attn'])
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='resnet.pth')
    families = {name: Family(cfg.model, name, SHAPE) for name in ('acmix', 'conv')}
    sizes = dict(acmix=families['acmix'].own_size, conv=BackboneSize(12, (1, 2, 4, 1)))
    with pytest.raises(UsageError, match=r'conv is matched with base_channels 16 → 12, but '
                       r'resnet\.pth does not fit .*init_cfg=None'):
        check_pretraining(cfg, families, sizes)


def test_latency_is_matched_relative_to_the_reference(monkeypatch):
    cfg = config(SEGMENTATION)
    families = {name: Family(cfg.model, name, SHAPE) for name in ('acmix', 'conv')}
    measured = []

    def latencies(models, shape):
        measured.append(models)
        spread = Spread(1.01, 1., 1.02)
        return dict.fromkeys(models, Latency(spread, spread))

    monkeypatch.setattr(module, 'latencies', latencies)
    assert match_all(families, 'latency') == {
        name: family.own_size for name, family in families.items()}
    assert measured == [dict(reference=families['acmix'].model, variant=families['conv'].model)]


def test_latency_may_differ_more_than_counts(monkeypatch):
    cfg = config(SEGMENTATION)
    families = {name: Family(cfg.model, name, SHAPE) for name in ('acmix', 'conv')}

    def match_latency(best):
        """Match on a machine whose second measurement is the best; return the sizes it tried."""
        ratios, sizes = iter([1.2, best, *[1.1] * 10]), []

        def ratio(reference, family, size):
            sizes.append(size)
            return next(ratios)

        monkeypatch.setattr(module, 'latency_ratio', ratio)
        return match_all(families, 'latency')['conv'], sizes

    found, sizes = match_latency(1.04)
    assert found == sizes[1]
    assert len(sizes) == 12
    with pytest.raises(UsageError, match=r'within 5% of the latency of .* off by 6\.00%'):
        match_latency(1.06)


def test_equal_time_gives_the_faster_network_more_iterations(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'iteration_seconds', lambda cfg, models: dict(acmix=0.5, conv=0.2))
    cfg = config(SEGMENTATION, shapes, **TINY)
    plan = make_plan(cfg, ['acmix', 'conv'], 'none', Budget(2, 'minutes'), str(tmp_path))
    assert [each['iterations'] for each in plan['variants'].values()] == [240, 600]
    for mixer, iterations in (('acmix', 240), ('conv', 600)):
        own = Config.fromfile(str(tmp_path / mixer / 'config.py'))
        assert own.train_cfg.max_iters == iterations
        assert own.param_scheduler[-1].end == iterations
    # The second call reads the plan instead of measuring again, and replaces the configs, which are
    # programs.
    path = tmp_path / 'acmix' / 'config.py'
    content = path.read_text()
    path.write_text('raise RuntimeError')
    monkeypatch.setattr(module, 'iteration_seconds', lambda cfg, models: pytest.fail('measured'))
    again = make_plan(cfg, ['acmix', 'conv'], 'none', Budget(2, 'minutes'), str(tmp_path))
    assert again == json.loads(json.dumps(plan))
    assert path.read_text() == content
    with pytest.raises(UsageError, match='belongs to another comparison, which differs in match, '
                       'budget, gpus_per_run, tune; name another folder with --work-dir'):
        make_plan(cfg, ['acmix', 'conv'], 'params', Budget(300, 'iters'), str(tmp_path), 2,
                  ['optim_wrapper.optimizer.lr', '1', '2'])
