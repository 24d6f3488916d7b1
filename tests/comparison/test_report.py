"""Reports of finished and unfinished comparisons."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.reports import invented_plan, invented_runs, write_result

from acmix_mm.comparison.report import gather, markdown, write_report
from acmix_mm.comparison.tuning import tuning_runs


@pytest.fixture
def report(tmp_path):
    """The text and the numbers of a report of invented runs."""
    def run(mious, tuning=(), price=None, plan=None):
        plan = plan or invented_plan(mious)
        numbers = gather(plan, invented_runs(tmp_path, mious), tuning, 'the command', price)
        return markdown(numbers), numbers
    return run


def test_mean_and_deviation(report):
    text, numbers = report(dict(acmix=[20., 23.], conv=[30., 32.]))
    found = numbers['variants']['acmix']
    assert found['quality'] == dict(mIoU=dict(
        mean=21.5, deviation=pytest.approx(np.std([20, 23], ddof=1)), values=[20., 23.]))
    assert found['training_seconds']['mean'] == 90.
    assert '| 90 ± 42 s | 21.5 ± 2.1 |' in text
    assert '| acmix | mIoU | 20 | 23 |' in text
    for absent in ('missing', 'Unfinished', 'Tuning', 'Costs', 'cost of'):
        assert absent not in text


def test_missing_runs_are_marked(tmp_path):
    mious = dict(acmix=[20., 23., 26.], conv=[30., None, None], attn=[None] * 3)
    path = write_report(invented_plan(mious), invented_runs(tmp_path, mious), [], 'the command')
    text = Path(path).read_text()
    assert '**Unfinished: 5 of 9 runs are missing.**' in text
    assert '| 23 ± 3 |\n' in text and '| 30 (2 missing) |\n' in text
    assert '| missing | 6 | missing | missing |\n' in text
    assert '| conv | mIoU | 30 | missing | missing |' in text
    assert '| attn | mIoU | missing | missing | missing |' in text
    numbers = json.loads((tmp_path / 'report.json').read_text())
    assert numbers['seeds'] == [0, 1, 2]
    assert numbers['variants']['conv']['quality']['mIoU']['values'] == [30., None, None]
    assert numbers['variants']['attn']['runs'] == []
    assert len(numbers['variants']['attn']['commands']) == 3
    for name in ('curves.png', 'quality_cost.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


def test_a_report_before_the_first_run(tmp_path):
    mious = dict(acmix=[None], conv=[None])
    path = write_report(invented_plan(mious), invented_runs(tmp_path, mious), [], 'the command')
    text = Path(path).read_text()
    assert '**Unfinished: 2 of 2 runs are missing.**' in text
    assert '.png' not in text and not list(tmp_path.glob('*.png'))


def test_costs(report):
    """At 3.6 per hour, a second costs 0.001."""
    text, numbers = report(dict(acmix=[20., 23.], conv=[30., None]), price=3.6)
    found = numbers['variants']['acmix']['cost']
    assert found['training']['values'] == pytest.approx([0.06, 0.12])
    assert found['million_images'] == pytest.approx(dict(low=9., median=10., high=20.))
    assert numbers['variants']['conv']['cost']['training']['values'] == [pytest.approx(0.06), None]
    assert '| 0.09 ± 0.0424 | 10 | 21.5 ± 2.1 |' in text
    assert 'Costs are at 3.6 per hour of a device: of the training time of a run on a ' in text
    plan = invented_plan(['acmix', 'conv'])
    plan['settings'].update(gpus_per_run=4, budget='2 minutes', match='latency')
    text, numbers = report(dict(acmix=[20.], conv=[30.]), price=3.6, plan=plan)
    assert numbers['variants']['acmix']['cost']['training']['mean'] == pytest.approx(0.24)
    assert 'a run on 4 devices' in text and 'the number of processes of a run, 4' in text
    assert '- the training time, 2 minutes and so the cost of training: ' in text
    assert '- the latency of the whole model and so the cost of a prediction: ' in text


def test_tuning_is_reported(report, tmp_path):
    tune = ['optim_wrapper.optimizer.lr', '1e-4', '1e-3', '1e-2']
    plan = invented_plan(['acmix', 'conv'])
    plan['settings']['tune'] = tune
    tried = tuning_runs(str(tmp_path), ['acmix', 'conv'], tune, 1)
    for run, miou in zip(tried, (1., 2., 5., 4., 3.)):
        write_result(run, miou)
    text, numbers = report(dict(acmix=[None], conv=[None]), tried, plan=plan)
    assert '| acmix | 1 | 5 | 3 |\n| conv | 2 | 4 | missing |' in text
    assert 'the rest of the recipe, except for optim_wrapper.optimizer.lr, which was tuned' in text
    assert numbers['variants']['conv']['tuning'] == {
        '1e-4': dict(mIoU=2.), '1e-3': dict(mIoU=4.), '1e-2': None}
    write_result(tried[-1], 6.)
    plan['variants']['acmix']['tuned'], plan['variants']['conv']['tuned'] = '1e-3', '1e-2'
    text, _ = report(dict(acmix=[None], conv=[None]), tried, plan=plan)
    assert '| acmix | 1 | **5** | 3 |\n| conv | 2 | 4 | **6** |' in text
    assert 'The chosen value is the first or the last one for conv: ' in text


def test_metrics_may_differ_between_mixers(tmp_path):
    runs = invented_runs(tmp_path, dict(acmix=[20.], conv=[30.]))
    path = tmp_path / 'conv' / 'seed_0' / 'result.json'
    result = json.loads(path.read_text())
    result['metrics'] = dict(bbox_mAP=0.5)
    path.write_text(json.dumps(result))
    variants = gather(invented_plan(['acmix', 'conv']), runs)['variants']
    assert list(variants['acmix']['quality']) == ['mIoU']
    assert list(variants['conv']['quality']) == ['bbox_mAP']
