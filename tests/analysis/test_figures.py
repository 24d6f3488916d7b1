"""Figures show the values that they are given."""

import numpy as np
import pytest
import torch

from acmix_mm.analysis import figures
from acmix_mm.analysis.receptive_field import ReceptiveField
from acmix_mm.datasets.shapes import Task
from acmix_mm.datasets.tasks import Cue
from acmix_mm.utils.errors import UsageError

IMAGE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_attention_figure():
    weights = torch.zeros(2, 10, 15)
    weights[:, 2:5, 3:7] = torch.rand(2, 3, 4)
    attention = figures.PointAttention(weights, 1, 12, True)
    drawn = figures.draw_attention(IMAGE, (20, 12), attention, (4., 4.), 'of a point')
    overview, *heads = (axes for axes in drawn.axes if axes.get_visible())
    np.testing.assert_array_equal(overview.images[0].get_array(), IMAGE)
    box, = overview.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((12, 8), 16, 12)
    for head, axes in zip(weights, heads):
        np.testing.assert_array_equal(axes.images[0].get_array(), head.numpy())
        assert axes.images[0].get_extent() == [0, 60, 40, 0]
        assert axes.get_xlim() == (12, 28)
        cross, = axes.lines
        assert cross.get_xydata().tolist() == [[20.5, 12.5]]


def test_energy_figure():
    energies = dict(one=np.random.rand(2, 10, 15), two=np.random.rand(2, 5, 8))
    drawn = figures.draw_energies(IMAGE, energies, dict(one=(4., 4.), two=(8., 8.)), 'paths')
    shown = {axes.get_title(): axes.images[0] for axes in drawn.axes if axes.images}
    for name, pair in energies.items():
        for energy, path in zip(pair, ('α · attention', 'β · convolution')):
            panel = shown[f'{name}\n{path}']
            np.testing.assert_array_equal(panel.get_array(), energy)
            assert panel.get_clim() == (0, pair.max())


def test_receptive_field_figure():
    energy = np.random.rand(20, 30)
    fields = [('a', [ReceptiveField('stage 0', 4, energy, 3, 5, 7)]),
              ('b', [ReceptiveField('stage 0', 4, energy**2, 0, 0, 2),
                     ReceptiveField('stage 1', 8, energy, 1, 1, 9)])]
    drawn = figures.draw_receptive_fields(fields)
    panels = [axes for axes in drawn.axes if axes.images and axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        'a\nstage 0, stride 4: 7 px', 'b\nstage 0, stride 4: 2 px', 'stage 1, stride 8: 9 px']
    np.testing.assert_allclose(panels[0].images[0].get_array(), np.sqrt(energy / energy.max()))
    assert len({axes.images[0].get_clim() for axes in panels}) == 1
    assert panels[0].patches[0].get_xy() == (5, 3)


@pytest.mark.parametrize('task', [Task(), Cue(20)])
def test_task_figure(task):
    """The first images of the dataset with this seed, and a line from each disc to its cue."""
    drawn = figures.draw_task(task, 'name', 64, seed=3)
    rng = np.random.default_rng(3)
    assert len(drawn.axes) == 3
    for axes in drawn.axes:
        scene = task.draw(64, rng)
        np.testing.assert_array_equal(axes.images[0].get_array(), scene.image[..., ::-1])
        for shape, patch in zip(scene.shapes, axes.patches):
            np.testing.assert_allclose(patch.get_xy()[:-1], shape.corners)
        for line, clue in zip(axes.lines, scene.clues):
            np.testing.assert_allclose(line.get_xydata()[1], clue[0])
        assert len(axes.patches) == len(scene.shapes)
        assert len(axes.lines) == len(scene.clues)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(task.classes)


def test_figures_are_written_atomically(tmp_path):
    with pytest.raises(UsageError, match=r'\.png files, got .*rates\.pdf'):
        figures.check_png(str(tmp_path / 'rates.pdf'))
    with pytest.raises(UsageError, match='none does not exist'):
        figures.check_png(str(tmp_path / 'none' / 'rates.png'))
    (tmp_path / 'taken.png').mkdir()
    with pytest.raises(UsageError, match=r'taken\.png cannot be written \('):
        figures.save(figures.Figure(), str(tmp_path / 'taken.png'))
    assert [path.name for path in tmp_path.iterdir()] == ['taken.png']
