"""Matching the cost of networks with different token mixers."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from helpers import ROOT
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.analysis.complexity import predict
from acmix_mm.analysis.flops import count, total
from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.comparison import matching
from acmix_mm.comparison.matching import TOLERANCE, BackboneSize, Family, match_by_measuring
from acmix_mm.comparison.plan import match_all
from acmix_mm.engine.config import load_config
from acmix_mm.utils.errors import UsageError

SEGMENTATION = 'configs/shapes/upernet_acmix_r50.py'
DETECTION = 'configs/shapes/maskrcnn_acmix_swin.py'
# Options that leave fewer blocks, which are faster to count, for each host.
FEW_BLOCKS = {
    SEGMENTATION: {'model.backbone.stage_blocks': [1, 1, 2, 1], 'model.backbone.base_channels': 32,
                   'model.decode_head.in_channels': [128, 256, 512, 1024],
                   'model.auxiliary_head.in_channels': 512},
    DETECTION: {'model.backbone.depths': [1, 1, 2, 1], 'model.backbone.embed_dims': 48,
                'model.neck.in_channels': [48, 96, 192, 384]},
    'configs/shapes/maskrcnn_acmix_pvt.py': {'model.backbone.num_layers': [1, 1, 2, 1]},
    'configs/shapes/maskrcnn_acmix_san.py': {},
}
SHAPE = (64, 64)
IMAGE = torch.zeros(1, 3, *SHAPE)


def config(path, options=None):
    """Load a config and make its scope the current one, as the tools do."""
    cfg = load_config(str(ROOT / path), options)
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.mark.parametrize('quantity', ['params', 'flops'])
@pytest.mark.parametrize(('path', 'mixer'), [
    (path, mixer) for path in FEW_BLOCKS for mixer in MIXERS
    if mixer in MODELS.get(load_config(str(ROOT / path)).model.backbone.type).mixers])
def test_matches_within_two_percent_of_the_backbone(path, mixer, quantity):
    cfg = config(path, FEW_BLOCKS[path])
    reference = 'attn' if mixer == 'acmix' else 'acmix'
    families = {name: Family(cfg.model, name, SHAPE) for name in (reference, mixer)}
    sizes = match_all(families, quantity)
    assert sizes[reference] == families[reference].own_size
    counted = {}
    for name, family in families.items():
        # Count the network as it is trained, on a real image.
        model = MODELS.build(family.config(sizes[name])).eval()
        model.auxiliary_head = None
        counted[name] = (total(count(model.backbone, partial(model.backbone, IMAGE))),
                         total(count(model, partial(predict, model, IMAGE))))
    index = ('params', 'flops').index(quantity)
    difference = counted[mixer][1][index] - counted[reference][1][index]
    assert abs(difference) <= TOLERANCE * counted[reference][0][index]
    assert families[mixer].counts(sizes[mixer])[:2] == tuple(counted[mixer][1])


def test_the_network_of_the_diagnostic_tasks_matches():
    cfg = config('configs/shapes/fcn_acmix_resnet_tasks.py')
    # Involution needs a multiple of four channels.
    mixers = ['acmix', *(mixer for mixer in MIXERS if mixer not in ('acmix', 'involution'))]
    match_all({mixer: Family(cfg.model, mixer, SHAPE) for mixer in mixers}, 'params')


def test_a_variant_of_a_host_is_matched():
    cfg = config(SEGMENTATION, FEW_BLOCKS[SEGMENTATION])
    cfg.model.backbone.type = 'ACmixResNetV1d'
    families = {name: Family(cfg.model, name, SHAPE) for name in ('acmix', 'conv')}
    sizes = match_all(families, 'params')
    assert sizes['conv'] != sizes['acmix'] == BackboneSize(32, (1, 1, 2, 1))
    with torch.device('meta'):
        backbone = MODELS.build(families['conv'].config(sizes['conv']).backbone)
    assert type(backbone).__name__ == 'ACmixResNetV1d'
    assert backbone.stem[6].out_channels == sizes['conv'].width


def test_matching_network_keeps_its_size():
    family = Family(config(SEGMENTATION).model, 'attn', SHAPE)
    own = family.count('params', family.own_size)
    assert matching.match(family, 'params', own, 0.) == family.own_size
    assert family.describe(family.own_size) == 'nothing'
    assert family.config(family.own_size) == family.model


def test_error_names_the_nearest_size(monkeypatch):
    monkeypatch.setattr(matching, 'BLOCKS_CHANGED', (0,))
    cfg = config(SEGMENTATION)
    families = {name: Family(cfg.model, name, SHAPE) for name in ('acmix', 'conv')}
    with pytest.raises(UsageError, match=r'conv cannot be matched within 2% of the parameters of '
                       r"the reference's backbone: the closest network, which changes .*, is off "
                       r'by \d+\.\d\d%; .* --match none'):
        match_all(families, 'params')


def test_necks_and_heads_follow_the_width():
    family = Family(config(SEGMENTATION).model, 'acmix', SHAPE)
    model = family.config(BackboneSize(20, (1, 1, 1, 1)))
    assert model.decode_head.in_channels == [80, 160, 320, 640]
    assert model.auxiliary_head.in_channels == 320
    model = Family(config(DETECTION).model, 'acmix', SHAPE).config(BackboneSize(30, (2, 2, 2, 2)))
    assert model.neck.in_channels == [30, 60, 120, 240]
    broken = deepcopy(family.model)
    broken.decode_head.in_channels = [1, 2, 3, 4]
    with pytest.raises(UsageError, match=r'model\.decode_head\.in_channels is \[1, 2, 3, 4\]'):
        Family(broken, 'acmix', SHAPE).config(BackboneSize(20, (1, 1, 1, 1)))


def test_match_by_measuring():
    """On a machine whose latency grows with the square root of the multiply-adds."""
    cfg = config(SEGMENTATION, FEW_BLOCKS[SEGMENTATION])
    family = Family(cfg.model, 'conv', SHAPE)
    target = family.count('flops', family.own_size)
    tried = []

    def ratio(size):
        tried.append(size)
        return 1.2 * (family.count('flops', size) / target)**0.5

    size = match_by_measuring(family, ratio)
    assert abs(ratio(size) - 1) <= TOLERANCE
    assert len(set(tried)) <= 12
