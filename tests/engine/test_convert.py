"""tools/convert_weights.py and the conversion behind it."""

import inspect
import json
import re
from contextlib import nullcontext

import mmdet.models.backbones.pvt as mmdet_pvt
import mmdet.models.backbones.resnext as mmdet_resnext
import mmdet.models.backbones.swin as mmdet_swin
import numpy as np
import pytest
import timm
import torch
from helpers import relative_error
from helpers.checkpoints import PVT, SWIN, write_bad_checkpoint
from helpers.weights import randomised
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors import safe_open
from safetensors.torch import save_file

from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.backbones.base import BACKBONES
from acmix_mm.checkpoints import is_path, read_pretrained
from acmix_mm.datasets.shapes import draw
from acmix_mm.engine.convert import ARCHS, convert, format_config, infer_arguments
from acmix_mm.engine.runner import prepared
from acmix_mm.utils.errors import CheckpointError, UsageError

TOOL = 'tools/convert_weights.py'
SIZES = [
    (ACmixSwinTransformer, dict(SWIN, window_size=5, mlp_ratio=2.0, qkv_bias=False,
                                use_abs_pos_embed=True, pretrain_img_size=64)),
    (ACmixSwinTransformer, dict(SWIN, patch_norm=False, in_channels=4)),
    (ACmixPyramidVisionTransformer, PVT),
    (ACmixPyramidVisionTransformer, dict(PVT, qkv_bias=False, sr_ratios=(4, 2), embed_dims=8)),
    (ACmixResNet, dict(depth=38, base_channels=8)),
    (ACmixResNet, dict(depth=18, base_channels=8, avg_down=True)),
    (ACmixResNet, dict(depth=34, base_channels=8, stem_channels=16, num_heads=2,
                       acmix_stages=(0, 3))),
    (ACmixResNet, dict(depth=18, base_channels=8, stage_blocks=(1, 2, 1, 1))),
    (ACmixResNet, dict(depth=101, base_channels=4)),
    (ACmixResNet, dict(depth=50, base_channels=8, stem_channels=16, deep_stem=True, avg_down=True,
                       stage_blocks=(1, 1, 1, 1), num_heads=2, acmix_stages=(1, 3))),
    (ACmixSAN, dict(depth=15, base_channels=32)),
    (ACmixSAN, dict(depth=10, base_channels=32, stage_blocks=(1, 1, 2, 1, 1))),
]


@pytest.mark.parametrize('is_acmix', [True, False], ids=['ACmix', 'plain'])
@pytest.mark.parametrize(('network', 'arguments'), SIZES, ids=lambda value: str(value)[:60])
def test_arguments_follow_from_the_weights(network, arguments, is_acmix, tmp_path):
    plain = dict(acmix_stages=()) if network is ACmixResNet else dict(mix='attn')
    saved = network(**{**arguments, **({} if is_acmix else plain)})
    torch.save(saved.state_dict(), tmp_path / 'weights.pth')
    found = read_pretrained(str(tmp_path / 'weights.pth'))
    assert found.is_acmix == is_acmix
    assert BACKBONES[found.host] is network
    inferred = infer_arguments(found)
    defaults = inspect.signature(network).parameters
    if not is_acmix:
        # The weights of a plain network do not determine where ACmix goes.
        arguments = {name: value for name, value in arguments.items()
                     if name not in ('num_heads', 'acmix_stages') or network is not ACmixResNet}
    for name in {*inferred, *arguments}:
        actual = inferred.get(name, defaults[name].default)
        expected = arguments.get(name, defaults[name].default)
        assert actual == expected or tuple(actual) == tuple(expected), name


@torch.no_grad()
def test_plain_swin_of_timm_by_the_tool(run_tool, tmp_path):
    plain = randomised(timm.create_model('swin_tiny_patch4_window7_224'), 0.1)
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'swin.pth')
    done = run_tool(TOOL, tmp_path / 'swin.pth', tmp_path / 'acmix.pth', '--arch', 'swin-t')
    assert done.returncode == 0, done.stderr
    assert "recognised as plain Swin, timm's naming" in done.stdout
    for heading in ('loaded: ', 'left at the initial value: ', 'dropped: '):
        assert heading in done.stdout
    assert re.search(r'Difference of the outputs .*: 0\.0e\+00, 0\.0e\+00', done.stdout)
    # The printed config builds a backbone that computes the features of timm's class.
    printed = re.search(r'^  (dict\(type=.*\))$', done.stdout, re.MULTILINE)[1]
    backbone = eval(printed, dict(dict=dict))
    model = MODELS.build(backbone)
    model.init_weights()
    model.eval()
    x = torch.randn(1, 3, 224, 224)
    *maps, last = plain.forward_intermediates(x, intermediates_only=True, norm=False)
    # Maps of one window are not shifted, in this Swin and in timm's.
    for expected, actual in zip([*maps, last], model(x)):
        normed = torch.nn.functional.layer_norm(expected.movedim(1, 3), expected.shape[1:2])
        assert relative_error(actual, normed.movedim(3, 1)) < 1e-5
    saved = torch.load(tmp_path / 'acmix.pth', weights_only=True)
    assert saved['meta']['source'] == str(tmp_path / 'swin.pth')
    assert saved['meta']['backbone']['type'] == 'ACmixSwinTransformer'


@torch.no_grad()
def test_writes_safetensors(tmp_path):
    plain = mmdet_pvt.PyramidVisionTransformer(**PVT)
    randomised(plain)
    torch.save(plain.state_dict(), tmp_path / 'pvt.pth')
    target = tmp_path / 'acmix.safetensors'
    report = convert(str(tmp_path / 'pvt.pth'), str(target))
    with safe_open(target, 'pt') as file:
        assert "plain PVT, MMDetection's naming" in file.metadata()['recognised']
    arguments = infer_arguments(read_pretrained(str(target)))
    backbone = dict(type='ACmixPyramidVisionTransformer', **arguments)
    assert format_config(backbone, str(target)) in report
    model = MODELS.build(dict(backbone, init_cfg=dict(type='Pretrained', checkpoint=str(target))))
    model.init_weights()
    model.eval()
    x = torch.randn(1, 3, 64, 48)
    for expected, actual in zip(plain(x), model(x)):
        assert relative_error(actual, expected) < 1e-5


@torch.no_grad()
def test_report_of_the_loss_in_resnet(tmp_path):
    plain = randomised(ACmixResNet(26, base_channels=16, acmix_stages=()))
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    report = convert(str(tmp_path / 'resnet.pth'), str(tmp_path / 'acmix.pth'))
    converted = ACmixResNet(26, base_channels=16, init_cfg=dict(checkpoint=tmp_path / 'acmix.pth'))
    converted.load_state_dict(torch.load(tmp_path / 'acmix.pth')['state_dict'])
    converted.eval()

    image = draw(224, np.random.default_rng(0))[0][..., ::-1]
    x = (torch.tensor(image.copy()).permute(2, 0, 1)[None].float() - 114) / 58
    reported = re.search(r'Difference of the outputs .*: (.*)', report)[1].split(', ')
    assert len(reported) == 4
    for text, expected, actual in zip(reported, plain(x), converted(x)):
        lost = (actual - expected).square().mean().sqrt() / expected.std()
        assert float(text) == pytest.approx(lost.item(), rel=0.06)
        assert lost > 0.05
    # The first block has the same inputs in both networks.
    x = plain.layer1[0].relu(plain.layer1[0].bn1(plain.layer1[0].conv1(
        plain.maxpool(plain.relu(plain.bn1(plain.conv1(x)))))))
    expected, actual = (net.layer1[0].bn2(net.layer1[0].conv2(x)) for net in (plain, converted))
    lost = (actual - expected).square().mean().sqrt() / expected.std()
    measured = re.findall(r'layer1\.0 (\d+)%', report)
    assert len(measured) == 1
    assert int(measured[0]) == pytest.approx(100 * lost.item(), abs=0.6)


def test_san_of_another_depth(tmp_path):
    plain = randomised(ACmixSAN(10, base_channels=32, stage_blocks=(1, 1, 2, 1, 1), mix='attn'))
    torch.save(plain.state_dict(), tmp_path / 'san.pth')
    report = convert(str(tmp_path / 'san.pth'), str(tmp_path / 'acmix.pth'))
    assert "type='ACmixSAN', depth=10, base_channels=32, stage_blocks=(1, 1, 2, 1, 1)," in report
    assert 'generated image: 0.0e+00, 0.0e+00, 0.0e+00, 0.0e+00' in report
    torch.save({key: value for key, value in plain.state_dict().items()
                if not key.startswith('layer4.')}, tmp_path / 'four.pth')
    with pytest.raises(CheckpointError, match='a SAN has five stages, and it has 4'):
        convert(str(tmp_path / 'four.pth'), str(tmp_path / 'acmix4.pth'))


def hub_cache(root, repository, files):
    """Write a cache of the Hugging Face hub that holds one repository."""
    folder = root / f'models--{repository.replace("/", "--")}'
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs' / 'main').write_text('0' * 40)
    snapshot = folder / 'snapshots' / ('0' * 40)
    snapshot.mkdir(parents=True)
    for name, write in files.items():
        write(snapshot / name)


@pytest.mark.parametrize('source', ['timm://resnet26.bt_in1k', 'hf-hub:somebody/resnet26'])
def test_through_timm(source, run_tool, tmp_path):
    """From a cache of the hub, as after a download."""
    plain = randomised(timm.create_model('resnet26'))
    config = dict(architecture='resnet26', num_classes=1000, pretrained_cfg=dict(num_classes=1000))
    repository = 'somebody/resnet26' if 'somebody' in source else 'timm/resnet26.bt_in1k'
    hub_cache(tmp_path / 'hub', repository, {
        'model.safetensors': lambda path: save_file(plain.state_dict(), path),
        'config.json': lambda path: path.write_text(json.dumps(config))})
    offline = dict(HF_HUB_CACHE=str(tmp_path / 'hub'), HF_HUB_OFFLINE='1')
    done = run_tool(TOOL, source, tmp_path / 'acmix.pth', **offline)
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / 'acmix.pth', weights_only=True)['state_dict']
    # All stages of timm's ResNet-26 have two blocks, unlike those of the paper's.
    last = 'layer4.1.conv3.weight'
    assert torch.equal(weights[last], plain.state_dict()[last])

    absent = run_tool(TOOL, source.replace('26', '50').replace('bt_', 'a1_'), tmp_path / 'no.pth',
                      **offline)
    assert absent.returncode == 1
    assert re.fullmatch(r'error: The checkpoint \S+ could not be downloaded .*\n', absent.stderr)
    assert not (tmp_path / 'no.pth').exists()


@pytest.mark.parametrize(('source', 'expected'), [
    ('weights.pth', True), ('a/b.safetensors', True), ('https://host/a.pth', False),
    ('timm://resnet50', False), ('torchvision://resnet50', False), ('hf-hub:timm/resnet50', False),
])
def test_missing_files_are_reported_before_training(source, expected):
    assert is_path(source) == expected
    refused = pytest.raises(CheckpointError, match='does not exist') if expected else nullcontext()
    with refused, prepared(Config(dict(launcher='none')), [source]):
        pass


def test_unknown_timm_model(run_tool, tmp_path):
    done = run_tool(TOOL, 'timm://resnet999', tmp_path / 'acmix.pth')
    assert done.returncode == 1
    assert done.stderr == ('error: timm has no weights named resnet999 (Unknown model '
                           '(resnet999)); timm.list_pretrained() lists all that it has.\n')


@pytest.mark.parametrize(('kind', 'message'), [
    ('code', 'is refused and nothing in it was run'),
    ('truncated', 'cannot be read'),
    ('empty', 'cannot be read'),
    ('text', 'cannot be read'),
    ('no weights', 'holds no weights'),
    ('ResNet', 'is of no known network'),
    ('wider', 'does not fit'),
    ('missing', 'does not exist'),
])
def test_refusal_writes_nothing(kind, message, tmp_path):
    path = write_bad_checkpoint(kind, tmp_path)
    before = sorted(tmp_path.iterdir())
    for target in ('acmix.pth', 'acmix.safetensors'):
        with pytest.raises(CheckpointError, match=message) as caught:
            convert(str(path), str(tmp_path / target), 'swin-t' if kind == 'wider' else None)
        assert str(path) in str(caught.value)
        assert '\n' not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_determine_no_backbone(tmp_path):
    state_dict = mmdet_swin.SwinTransformer(**SWIN).state_dict()
    lacking = 'stages.1.blocks.0.attn.w_msa.relative_position_bias_table'
    torch.save({key: value for key, value in state_dict.items() if key != lacking},
               tmp_path / 'part.pth')
    with pytest.raises(CheckpointError, match=f"is incomplete: it lacks '{lacking}'"):
        convert(str(tmp_path / 'part.pth'), str(tmp_path / 'acmix.pth'))
    resnext = mmdet_resnext.ResNeXt(depth=50, groups=4, num_stages=1, strides=(1,),
                                    dilations=(1,), out_indices=(0,))
    torch.save(resnext.state_dict(), tmp_path / 'resnext.pth')
    with pytest.raises(CheckpointError, match='its 3×3 convolutions are grouped, as in ResNeXt'):
        convert(str(tmp_path / 'resnext.pth'), str(tmp_path / 'acmix.pth'))
    v2 = mmdet_pvt.PyramidVisionTransformerV2(embed_dims=8, num_layers=[1, 1, 1, 1])
    torch.save(v2.state_dict(), tmp_path / 'v2.pth')
    with pytest.raises(CheckpointError, match='like PVT v2'):
        convert(str(tmp_path / 'v2.pth'), str(tmp_path / 'acmix.pth'))
    torch.save(state_dict, tmp_path / 'swin.pth')
    with pytest.raises(CheckpointError, match=r'is of a Swin .* --arch asks for pvt-t'):
        convert(str(tmp_path / 'swin.pth'), str(tmp_path / 'acmix.pth'), 'pvt-t')
    assert not list(tmp_path.glob('*acmix*'))


def test_invalid_destinations(tmp_path):
    torch.save(mmdet_swin.SwinTransformer(**SWIN).state_dict(), tmp_path / 'swin.pth')
    with pytest.raises(UsageError, match=r'written as \.pth or \.safetensors; .*acmix\.bin'):
        convert(str(tmp_path / 'swin.pth'), str(tmp_path / 'acmix.bin'))
    with pytest.raises(UsageError, match='absent does not exist; create it'):
        convert(str(tmp_path / 'swin.pth'), str(tmp_path / 'absent' / 'acmix.pth'))
    (tmp_path / 'acmix.pth').mkdir()
    with pytest.raises(UsageError, match='cannot be written'):
        convert(str(tmp_path / 'swin.pth'), str(tmp_path / 'acmix.pth'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['acmix.pth', 'swin.pth']


def test_networks_of_the_paper():
    assert list(ARCHS) == ['resnet-26', 'resnet-38', 'resnet-50', 'san-10', 'san-15', 'san-19',
                           'pvt-t', 'pvt-s', 'swin-t', 'swin-s']
