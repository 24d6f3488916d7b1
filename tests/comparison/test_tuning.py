"""Tuning of a setting for each mixer."""

import json
import math

import pytest
from helpers.comparison import SEGMENTATION, TINY, config
from helpers.reports import write_result
from mmengine.config import Config

from acmix_mm.comparison import plan as module
from acmix_mm.comparison.plan import make_plan, record_tuning
from acmix_mm.comparison.schedule import Budget
from acmix_mm.comparison.timing import Latency, Spread
from acmix_mm.comparison.tuning import best_values, check_tuning, tuning_runs
from acmix_mm.utils.errors import UsageError

RATE = 'optim_wrapper.optimizer.lr'


def test_each_mixer_gets_its_best_value(tmp_path):
    tune = [RATE, '1e-4', '1e-3', '1e-2']
    runs = tuning_runs(str(tmp_path), ['acmix', 'conv'], tune, 1)
    assert len({run.folder for run in runs}) == 6
    assert len({run.seed for run in runs}) == 1 and runs[0].seed > 100_000
    mious = dict(acmix=[5., 7., 7.], conv=[math.nan, 1., 2.])
    for index, run in enumerate(runs):
        write_result(run, mious[run.mixer][index // 2])
    assert best_values(runs) == dict(acmix='1e-3', conv='1e-2')


@pytest.mark.parametrize(('tune', 'message'), [
    (['optim_wrapper.optimizer.learning_rate', '1', '2'], 'the setting optim_wrapper.optimizer.'
     'learning_rate, which the config .* does not have'),
    (['param_scheduler.9.end', '1', '2'], 'the setting param_scheduler.9.end, which'),
    ([RATE], 'two or more different values'),
    ([RATE, '1'], 'two or more different values'),
    ([RATE, '1', '1'], 'two or more different values, as in .*; got .*lr 1 1'),
    ([RATE, '1/2', '1'], 'two or more different values'),
])
def test_the_setting_is_checked(tune, message):
    cfg = config(SEGMENTATION)
    with pytest.raises(UsageError, match=message):
        check_tuning(cfg, tune)
    check_tuning(cfg, ['param_scheduler.0.begin', '0', '1'])
    check_tuning(cfg, None)


def test_the_values_are_written_to_plan_and_configs(shapes, tmp_path, monkeypatch):
    spread = Spread(1., 1., 1.)
    monkeypatch.setattr(module, 'latencies', lambda models, shape: dict.fromkeys(
        models, Latency(spread, spread)))
    cfg = config(SEGMENTATION, shapes, **TINY)
    own_rate = cfg.optim_wrapper.optimizer.lr
    plan = make_plan(cfg, ['acmix', 'conv'], 'none', Budget(6, 'iters'), str(tmp_path),
                     tune=[RATE, '1', '2e-5'])

    def rates():
        return [Config.fromfile(str(tmp_path / mixer / 'config.py')).optim_wrapper.optimizer.lr
                for mixer in ('acmix', 'conv')]

    assert rates() == [own_rate, own_rate]
    record_tuning(cfg, plan, dict(acmix='1', conv='2e-5'), str(tmp_path))
    assert rates() == [1, 2e-5]
    variants = json.loads((tmp_path / 'plan.json').read_text())['variants']
    assert [variants[mixer]['tuned'] for mixer in ('acmix', 'conv')] == ['1', '2e-5']
