"""The summary of several comparisons."""

import json

import numpy as np
import pytest
from helpers.reports import invented_plan, invented_runs
from helpers.tools import call_tool, plain_message

from acmix_mm.comparison.report import gather
from acmix_mm.comparison.summary import draw_sweep, draw_tasks, read_reports


@pytest.fixture
def folders(tmp_path):
    """The work directories of two comparisons, one of which is not finished."""
    found = {}
    for label, mious in (('8', dict(conv=[20., 24.], attn=[30., None])),
                         ('4', dict(conv=[40., 42.], acmix=[None, None], attn=[50., 51.]))):
        folder = tmp_path / label
        numbers = gather(invented_plan(mious), invented_runs(folder, mious))
        (folder / 'report.json').write_text(json.dumps(numbers))
        found[label] = folder
    return found


def named(folders):
    return [f'{label}={folder}' for label, folder in folders.items()]


def test_table(folders, tmp_path):
    done = call_tool('summarize', *named(folders), '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out' / 'summary.md').read_text() == """\
| task | conv | attn | acmix |
|---|---|---|---|
| 8 | 22 ± 2.8 | 30 (1 missing) | missing |
| 4 | 41 ± 1.4 | 50.5 ± 0.71 | missing |

mIoU (%): mean ± standard deviation over 2 seeds. A difference that does not clearly exceed the \
deviations is not significant.

![The same as a figure](summary.png)
"""
    assert (tmp_path / 'out' / 'summary.png').read_bytes().startswith(b'\x89PNG')


def test_metrics_have_a_row_each(folders, tmp_path):
    path = folders['4'] / 'report.json'
    path.write_text(path.read_text().replace('mIoU', 'bbox_mAP'))
    assert call_tool('summarize', *named(folders), '--out', tmp_path).returncode == 0
    text = (tmp_path / 'summary.md').read_text()
    assert '| 8 | mIoU (%) | 22 ± 2.8 |' in text
    assert '| 4 | bbox_mAP (0 to 1) | 41 ± 1.4 |' in text
    assert len(draw_tasks(read_reports(folders)).axes) == 2


def test_a_sweep_is_in_numerical_order(folders, tmp_path):
    done = call_tool('summarize', *named(folders), '--sweep', 'distance', '--reach', 'conv=5',
                     '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / 'summary.md').read_text().splitlines()
    assert [line.split('|')[1].strip() for line in lines[:4]] == ['distance', '---', '4', '8']


def test_figure_of_tasks(folders):
    (panel,) = draw_tasks(read_reports(folders)).axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ['8', '4']
    points = [bars.lines[0].get_xydata()[0] for bars in panel.containers]
    groups = np.array(points)[:, 0].round()
    assert [(group, y) for group, (_, y) in zip(groups, points)] == [
        (0, 22), (1, 41), (0, 30), (1, 50.5)]
    assert len({x for x, _ in points}) == 4
    assert [text.get_text() for text in panel.texts] == ['missing', 'missing']
    assert [len(bars.lines[2]) for bars in panel.containers] == [1, 1, 0, 1]


def test_figure_of_a_sweep(folders):
    reports = {label: read_reports(folders)[label] for label in ('4', '8')}
    (panel,) = draw_sweep(reports, 'distance', dict(attn=6., acmix=6.)).axes
    conv, acmix, attn, reach = panel.lines
    np.testing.assert_allclose(conv.get_xydata(), [(4, 41), (8, 22)])
    np.testing.assert_allclose(attn.get_xydata(), [(4, 50.5), (8, 30)])
    assert np.isnan(acmix.get_ydata()).all()
    assert reach.get_xdata() == [6, 6] and reach.get_color() == attn.get_color()
    assert [text.get_text() for text in panel.texts] == ['attn, acmix']
    # Without a deviation, the band has no width.
    ends = panel.collections[1].get_paths()[0].vertices
    assert np.ptp(ends[ends[:, 0] == 8][:, 1]) == 0
    assert np.ptp(ends[ends[:, 0] == 4][:, 1]) == pytest.approx(2 * np.std([50, 51], ddof=1))


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--reach', 'conv=3'], '--reach needs --sweep'),
    (['--sweep', 'd', '--reach', 'global=3'], '--reach names global, which was not compared'),
    (['x=nowhere'], 'nowhere has no report.json; name the work directory of a comparison'),
    (['4=work_dirs/other'], 'The labels of the comparisons must differ'),
])
def test_errors(arguments, message, folders, tmp_path):
    comparisons = [each for each in arguments if '=work' in each or '=no' in each]
    options = arguments[len(comparisons):]
    done = call_tool('summarize', *named(folders), *comparisons, *options, '--out', tmp_path)
    assert message in plain_message(done)


def test_labels_of_a_sweep_are_numbers(folders, tmp_path):
    done = call_tool('summarize', f'outline={folders["4"]}', '--sweep', 'd', '--out', tmp_path)
    assert "With --sweep, each label must be a number, got 'outline'." in plain_message(done)


def test_nothing_is_finished(tmp_path):
    runs = invented_runs(tmp_path, dict(conv=[None], attn=[None]))
    (tmp_path / 'report.json').write_text(json.dumps(gather(invented_plan(['conv', 'attn']), runs)))
    message = plain_message(call_tool('summarize', f'a={tmp_path}', '--out', tmp_path))
    assert 'No run of these comparisons is finished' in message
