"""What the figures of comparisons show."""

import numpy as np
import pytest
from helpers.reports import invented_plan, invented_runs
from matplotlib.backends.backend_agg import FigureCanvasAgg

from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.comparison import figures as module
from acmix_mm.comparison.figures import STYLES
from acmix_mm.comparison.report import gather


@pytest.fixture
def draw(monkeypatch):
    """Draw a figure instead of writing it."""
    def run(function, numbers):
        figures = []
        monkeypatch.setattr(module, 'save', lambda figure, path: figures.append(figure))
        function(numbers, 'figure.png')
        return figures[0]
    return run


@pytest.fixture
def numbers(tmp_path):
    runs = invented_runs(tmp_path, dict(acmix=[20., 23.], conv=[30., None], attn=[None, None]))
    return gather(invented_plan(['acmix', 'conv', 'attn']), runs, price=3.6)


def test_curves(numbers, draw):
    loss, miou = draw(module.draw_curves, numbers).axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ('iterations', 'training loss')
    assert miou.get_ylabel() == 'mIoU (%)'
    assert [line.get_label() for line in miou.lines] == ['acmix', 'conv']
    for line, mious in zip(loss.lines, ([20, 23], [30])):
        np.testing.assert_allclose(line.get_xydata(), [
            (index, np.mean(mious) / index) for index in range(1, 7)])
    for line, mean in zip(miou.lines, (21.5, 30)):
        np.testing.assert_allclose(line.get_xydata(), [(3, mean / 2), (6, mean)])
    # Only acmix has two runs, and so a deviation.
    (band,) = miou.collections
    ends = band.get_paths()[0].vertices
    assert np.ptp(ends[ends[:, 0] == 6][:, 1]) == pytest.approx(2 * np.std([20, 23], ddof=1))


def test_curves_against_time(numbers, draw):
    numbers['settings']['budget'] = '2 minutes'
    for panel in draw(module.draw_curves, numbers).axes:
        assert panel.get_xlabel() == 'training time (minutes)'
        assert [line.get_xdata()[-1] for line in panel.lines] == pytest.approx([1.5, 1.])


def test_quality_against_cost(numbers, draw):
    panels = draw(module.draw_quality_cost, numbers).axes
    assert [panel.get_xlabel() for panel in panels] == [
        'parameters of the model (M)', 'multiply-adds of the model (G)',
        'latency of a prediction (ms)', 'training time (minutes)', 'cost of training',
        'cost of a million images']
    for index, (factor, minutes, miou) in enumerate(((1, 1.5, 21.5), (1.25, 1, 30))):
        expected = [factor, 2 * factor, 10 * factor, minutes, 0.06 * minutes, 10 * factor]
        shown = [panel.containers[index].lines[0].get_xydata()[0] for panel in panels]
        np.testing.assert_allclose(shown, [(each, miou) for each in expected])
    assert all(len(panel.containers) == 2 for panel in panels)
    (bar,) = panels[0].containers[0].lines[2][1].get_segments()
    assert np.ptp(bar[:, 1]) == pytest.approx(2 * np.std([20, 23], ddof=1))
    for variant in numbers['variants'].values():
        del variant['cost']
    assert len(draw(module.draw_quality_cost, numbers).axes) == 4


@pytest.mark.parametrize('function', ['draw_curves', 'draw_quality_cost'])
def test_legends_fit(function, draw, tmp_path):
    """All mixers have an entry, within the figure and above its panels."""
    mious = {mixer: [20., 21.] for mixer in STYLES}
    numbers = gather(invented_plan(mious), invented_runs(tmp_path, mious))
    figure = draw(getattr(module, function), numbers)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(STYLES)
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert all(panel.bbox.y1 <= box.y0 for panel in figure.axes)


def test_every_mixer_has_a_style_of_its_own():
    assert set(MIXERS) <= set(STYLES)
    for keys in (('color', 'linestyle'), ('marker', 'markerfacecolor')):
        assert len({tuple(look[key] for key in keys) for look in STYLES.values()}) == len(STYLES)
