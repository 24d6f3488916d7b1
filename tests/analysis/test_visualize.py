"""Figures of predictions, attention and path energies."""

import cv2
import numpy as np
import pytest
import torch
from helpers.analysis import BACKBONES, SMALL, small_model
from helpers.tools import DETECTION, SEGMENTATION, Bomb
from mmengine.registry import MODELS

from acmix_mm.analysis.paths import last_layers, path_energies
from acmix_mm.analysis.visualize import StageLayers, visualize
from acmix_mm.engine.config import load_config
from acmix_mm.utils.errors import CheckpointError, UsageError


def test_visualize_detector(detector, shapes, run_tool, tmp_path):
    checkpoint, _ = detector
    done = run_tool('tools/visualize.py', DETECTION, checkpoint, shapes / 'val2017' / '00000.jpg',
                    '--out-dir', tmp_path / 'out', '--point', 90, 5, '--cfg-options', *SMALL)
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert written == ['00000_attention_stage_0.png', '00000_attention_stage_1.png',
                       '00000_attention_stage_2.png', '00000_attention_stage_3.png',
                       '00000_energy.png', '00000_predictions.png']
    for path in (tmp_path / 'out').iterdir():
        assert str(path) in done.stdout
        assert cv2.imread(str(path)).std() > 10


def test_visualize_segmentor(shapes, tmp_path, monkeypatch):
    cfg = small_model(SEGMENTATION, tmp_path / 'iter_1.pth', **{
        'model.decode_head.in_channels': [12, 24, 48, 96], 'model.auxiliary_head.in_channels': 48})
    drawn = {}
    monkeypatch.setattr('acmix_mm.analysis.visualize.save',
                        lambda figure, path: drawn.update({path.rsplit('_', 1)[-1]: figure}))
    visualize(cfg, str(tmp_path / 'iter_1.pth'), [str(shapes / 'val2017' / '00001.jpg')],
              str(tmp_path))
    # The figure shows the energies of the same layer in a separate forward pass.
    image = cv2.imread(str(shapes / 'val2017' / '00001.jpg'))[..., ::-1].copy()
    from mmseg.apis import init_model
    model = init_model(cfg, str(tmp_path / 'iter_1.pth'), device='cpu')
    mean, std = (torch.tensor(cfg.model.data_preprocessor[key])[:, None, None]
                 for key in ('mean', 'std'))
    given = (torch.from_numpy(image).permute(2, 0, 1).float() - mean) / std
    layer = model.backbone.stages[3].blocks[1].attn.w_msa
    inputs = []
    layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model.backbone(given[None])
    expected = path_energies(layer, inputs[0])
    shown = [axes.images[0].get_array() for axes in drawn['energy.png'].axes
             if axes.get_title().startswith('stage 3')]
    for values, energy in zip(shown, expected):
        np.testing.assert_allclose(values, energy.numpy(), rtol=1e-4)
    assert len(shown) == 2
    assert not np.array_equal(drawn['predictions.png'].axes[1].images[0].get_array(), image)


def test_point_is_located_in_every_stage():
    """The image was resized by two and padded before the backbone."""
    backbone = MODELS.build(BACKBONES['Swin']).eval()
    batch, image = torch.randn(1, 3, 128, 192), np.zeros((60, 90, 3), dtype=np.uint8)
    layers = StageLayers(backbone, last_layers(backbone), batch, image,
                         dict(img_shape=(120, 180)))
    drawn = layers.attention_figures((44, 10))
    # The centre of the pixel is at (89, 21) in the backbone's input.
    for stage, (row, column) in enumerate([(5, 22), (2, 11), (1, 5), (0, 2)]):
        layer = layers.layers[f'stage {stage}']
        expected = layer.module.attention_of_point(layer.x, row, column).weights
        head = drawn[f'attention_stage_{stage}'].axes[1].images[0]
        np.testing.assert_array_equal(head.get_array(), expected[0])
        # Positions are 4, 8, … pixels apart in the backbone's input, half of that in the image.
        assert head.get_extent()[1] == 2 * 2**stage * expected.shape[2]


def test_missing_paths_have_no_figures():
    batch, image = torch.randn(1, 3, 64, 64), np.zeros((64, 64, 3), dtype=np.uint8)
    for mix, attention in (('attn', 4), ('conv', 0)):
        backbone = MODELS.build({**BACKBONES['PVT'], 'mix': mix}).eval()
        layers = StageLayers(backbone, last_layers(backbone), batch, image,
                             dict(img_shape=(64, 64)))
        assert len(layers.attention_figures((0, 63))) == attention
        assert layers.energy_figure() == {}


def test_visualize_rejects_invalid_input(detector, shapes, tmp_path):
    checkpoint, cfg = detector
    image, given = str(shapes / 'val2017' / '00000.jpg'), (str(checkpoint),)
    other = load_config(DETECTION)
    plain = load_config('configs/shapes/maskrcnn_acmix_r50.py', {'model.backbone.acmix_stages': []})
    torch.save(MODELS.build(plain.model).state_dict(), tmp_path / 'bare.pth')
    (tmp_path / 'text.jpg').write_text('no image')
    for config, rest, message in [
            (cfg, (*given, [image], 'out', (96, 0)), 'lies outside .* 96 pixels wide and 96'),
            (cfg, (*given, [str(tmp_path / 'none.jpg')], 'out'), r'none\.jpg does not exist'),
            (cfg, (*given, [str(tmp_path / 'text.jpg')], 'out'), r'text\.jpg is not an image'),
            (cfg, (*given, [image, image], 'out'), 'Two images are called 00000'),
            (cfg, (str(tmp_path / 'no.pth'), [image], 'out'), r'no\.pth does not exist'),
            (cfg, (str(tmp_path / 'bare.pth'), [image], 'out'), 'has no class names'),
            (other, (*given, [image], 'out'), "does not match the config's model")]:
        with pytest.raises(UsageError, match=message):
            visualize(config, *rest)
    small_model('configs/shapes/maskrcnn_acmix_swin.py', tmp_path / 'plain.pth',
                **{'model.neck.in_channels': [12, 24, 48, 96], 'model.backbone.type': 'mmdet.'
                   'SwinTransformer'})
    plain = load_config(DETECTION, {
        'model.backbone.type': 'mmdet.SwinTransformer', 'model.backbone.embed_dims': 12,
        'model.backbone.depths': [1, 1, 1, 2], 'model.backbone.num_heads': [1, 1, 2, 2],
        'model.neck.in_channels': [12, 24, 48, 96]})
    with pytest.raises(UsageError, match='has no ACmix layer to visualize'):
        visualize(plain, str(tmp_path / 'plain.pth'), [image], 'out')


def test_visualize_rejects_code(detector, shapes, tmp_path):
    checkpoint, cfg = detector
    found = torch.load(checkpoint)
    found['meta']['trap'] = Bomb(tmp_path / 'ran')
    torch.save(found, tmp_path / 'bomb.pth')
    with pytest.raises(CheckpointError, match='nothing in it was run'):
        visualize(cfg, str(tmp_path / 'bomb.pth'), [str(shapes / 'val2017' / '00000.jpg')],
                  str(tmp_path))
    assert not (tmp_path / 'ran').exists()
