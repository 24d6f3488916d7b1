"""The GPU check, as far as it runs without a GPU."""

import json
import sys
from unittest.mock import MagicMock

import pytest
import torch
from helpers.stack import needs_custom_ops, needs_torch, needs_triton
from helpers.tools import call_tool

from acmix_mm.gpu_check import checks, measurements, run
from acmix_mm.gpu_check.baselines import BLOCK, neighbourhood_mask
from acmix_mm.gpu_check.checks import MODES, Check, NotRun, Plan, check, planned_checks
from acmix_mm.gpu_check.measurements import (
    COPY,
    FLEX,
    NATTEN,
    OURS,
    REFERENCE,
    SDPA,
    Comparison,
    Measurement,
    Sizes,
    comparisons,
    measure,
    sliding_comparison,
    sliding_name,
)
from acmix_mm.gpu_check.report import as_json, as_markdown
from acmix_mm.gpu_check.subjects import layers, operators
from acmix_mm.gpu_check.targets import targets
from acmix_mm.ops import backend

SIZES = Sizes(1, (8, 16), (7, 14), (32, 64))
SETTING = measurements.Setting('cpu', 'float32', 1)
# Imports that fail as on a machine with torch and Triton alone.
BLOCKED = '''
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm', 'torchvision'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return found(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
sys.argv = ['gpu_check', *sys.argv[1:]]
from acmix_mm.commands import run_tool
run_tool('gpu_check')
'''


@pytest.fixture
def few_checks(monkeypatch):
    """One quick check instead of all of them."""
    monkeypatch.setattr(run, 'planned_checks', lambda device: [
        Plan(layers(True)[0], 'tiled', 'float32'), NotRun('CUDA graph capture', 'needs a GPU')])


@needs_triton
@needs_custom_ops
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_needs_torch_and_triton_only(run_tool, tmp_path):
    """The whole of what runs without a GPU."""
    paths = [tmp_path / 'check.json', tmp_path / 'check.md']
    script = tmp_path / 'blocked.py'
    script.write_text(BLOCKED)
    # Setting it is the tool's task.
    done = run_tool(script, '--json', paths[0], '--markdown', paths[1], TRITON_INTERPRET='0')
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No GPU was used (needs an NVIDIA GPU of compute capability 8.0" in done.stdout
    found = json.loads(paths[0].read_text())
    assert all(each['passed'] for each in found['checks'])
    assert {each['name'] for each in found['checks']} >= {
        'ACmixConv2d', 'WindowACmix', 'sliding_window_attention', 'shift_conv'}
    assert {each['mode'] for each in found['checks']} == {'eager', 'autocast', 'torch.compile'}
    assert found['measurements'] == []
    assert {each['what'] for each in found['not_run']} == {
        'the Triton kernels in bfloat16', 'CUDA graph capture', 'all measurements',
        "torch's own backends, and the automatic choice of backends"}
    assert {each['met'] for each in found['targets']} == {None}
    text = paths[1].read_text()
    assert 'ACmixConv2d, bfloat16, forward, against the reference | ≥ 20× | not measured |' in text
    assert '- all measurements: need a GPU' in text


@pytest.mark.usefixtures('few_checks')
def test_wrong_results_fail(monkeypatch, tmp_path):
    paths = [tmp_path / 'check.json', tmp_path / 'check.md']
    options = ['--json', paths[0], '--markdown', paths[1]]
    done = call_tool('gpu_check', *options)
    assert done.returncode == 0, done.stderr
    assert '1 of 1 checks passed' in done.stdout

    tiled = backend._operators['sliding_window_attention']['tiled']
    monkeypatch.setitem(backend._operators['sliding_window_attention'], 'tiled', tiled._replace(
        run=lambda *arguments: 1.01 * tiled.run(*arguments)))
    done = call_tool('gpu_check', *options)
    assert done.returncode == 1
    assert '0 of 1 checks passed' in done.stdout
    assert '| ACmixConv2d | 4 channels | tiled | float32 | eager | error ' in paths[1].read_text()
    failed, = json.loads(paths[0].read_text())['checks']
    assert not failed['passed']
    assert failed['error'] > 1e-3

    def fail(*arguments):
        raise RuntimeError('out of resources\nmore')
    monkeypatch.setitem(backend._operators['sliding_window_attention'], 'tiled',
                        tiled._replace(run=fail))
    assert call_tool('gpu_check', *options).returncode == 1
    assert '| RuntimeError: out of resources |' in paths[1].read_text()


@pytest.mark.usefixtures('few_checks')
def test_outputs_are_checked_first(tmp_path):
    done = call_tool('gpu_check', '--json', tmp_path / 'none' / 'check.json')
    assert done.returncode == 1
    assert 'none does not exist; create it' in done.stderr
    assert 'checks passed' not in done.stdout


@needs_triton
def test_failing_kernels_do_not_fall_back(monkeypatch):
    """Otherwise, the check would compare torch's backend."""
    from acmix_mm.ops.sliding_attention import triton_kernels

    def fail(*arguments):
        raise RuntimeError('too many registers')
    monkeypatch.setattr(triton_kernels, 'attend', fail)
    subject = next(each for each in operators(True) if each.name == 'sliding_window_attention')
    result = check(Plan(subject, 'triton', 'float32'), 'cpu')
    assert not result.passed
    assert result.message == 'RuntimeError: too many registers'


def test_results_that_are_not_numbers_fail(monkeypatch):
    zero = torch.zeros(2)
    assert checks.largest_error([zero + 1.01, zero], [zero + 1, zero]) == pytest.approx(0.01, 1e-3)
    broken = torch.tensor([torch.nan, 1.])
    for actual in ([broken, zero], [zero, broken]):
        assert not checks.largest_error(actual, [zero + 1, zero]) <= 1
    with pytest.raises(ValueError, match=r'expected a tensor of shape \(2,\), got \(1,\)'):
        checks.largest_error([zero[:1]], [zero])
    # Neither does half precision pass for float32.
    subject = layers(True)[0]
    monkeypatch.setattr(checks, 'RUN', {**checks.RUN, 'eager': lambda run, inputs, cotangent: [
        each.half() for each in checks.run_eagerly(run, inputs, cotangent)]})
    assert 'dtype torch.float16, not torch.float32' in check(
        Plan(subject, 'tiled', 'float32'), 'cpu').message


def test_graphs_are_replayed_on_other_values(monkeypatch):
    """With stand-ins for CUDA: a graph whose replay computes nothing is found."""
    for name in ('Stream', 'CUDAGraph'):
        monkeypatch.setattr(torch.cuda, name, MagicMock)
    for name in ('stream', 'graph', 'current_stream'):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    subject = next(each for each in operators(True) if each.name == 'shift_conv')
    result = check(Plan(subject, 'folded', 'float32', 'CUDA graph'), 'cpu')
    assert result.message is None
    assert result.error > 0.5
    assert torch.cuda.graph.call_args.kwargs['stream'] is torch.cuda.stream.call_args.args[0]


def test_everything_is_planned_on_a_gpu(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(backend, 'TRITON_VERSION', '3.6.0')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    plans = list(planned_checks('cuda'))
    assert all(isinstance(each, Plan) for each in plans)
    assert {each.mode for each in plans} == set(MODES)
    for name in ('ACmixConv2d', 'WindowACmix'):
        own = [each for each in plans if each.subject.name == name]
        assert {each.backend for each in own} == {None, 'triton'}
        assert {each.dtype for each in own if each.mode == 'eager'} == set(measurements.DTYPES)
        assert {each.mode for each in own} == set(MODES)
    for name, backends in backend._operators.items():
        found = {each.backend for each in plans if each.subject.name == name}
        assert found == set(backends) - {'reference'}


@pytest.mark.parametrize('subject', [*operators(False), *layers(False)],
                         ids=lambda subject: f'{subject.name}-{subject.case}')
def test_subjects_of_the_gpu(subject):
    """On the CPU, by the automatic choice of backends."""
    result = check(Plan(subject, None, 'float32'), 'cpu')
    assert result.passed, result


@needs_torch('2.6', 'flex_attention, as it is here')
def test_measurements(monkeypatch):
    """At small sizes on the CPU: every implementation but NATTEN."""
    monkeypatch.setitem(sys.modules, 'natten', None)
    found = [each for comparison in comparisons('cpu', SIZES)
             for each in measure(comparison, repeats=1)]
    assert all(each.passed for each in found if isinstance(each, Check)), found
    times = {(each.name, each.dtype, each.passes): set() for each in found
             if isinstance(each, Measurement)}
    for each in found:
        if isinstance(each, Measurement):
            assert each.milliseconds > 0
            times[each.name, each.dtype, each.passes].add(each.implementation)
    assert times['ACmixConv2d', 'bfloat16', 'forward + backward'] == {OURS, REFERENCE, COPY}
    assert times[sliding_name(16), 'bfloat16', 'forward'] == {OURS, SDPA, FLEX, COPY}
    not_run = {(each.what, each.why.partition(':')[0]) for each in found
               if isinstance(each, NotRun)}
    missing = {what.partition(':')[0] for what, _ in not_run}
    # Most versions of torch have no backward pass of flex_attention on CPUs.
    assert missing - {FLEX} == {NATTEN}
    assert (f'{NATTEN}: {sliding_name(16)}', 'ModuleNotFoundError') in not_run
    for target in targets([each for each in found if isinstance(each, Measurement)]):
        assert (target.met is None) == (NATTEN in target.measure or (
            FLEX in missing and FLEX in target.measure and 'backward' in target.measure)), target


def test_failures_at_the_measured_size():
    comparison = sliding_comparison(SETTING, SIZES, 16)

    def fail(*arguments, **options):
        raise RuntimeError('illegal memory access')
    case = measurements.Case({OURS: measurements.Implementation(lambda: fail)}, [(None, 1)])
    failed, _ = measure(Comparison('broken', SETTING, [case]), 1)
    assert isinstance(failed, Check)
    assert not failed.passed
    assert failed.message == 'RuntimeError: illegal memory access'
    # A baseline that fails is none of our failures.
    case = measurements.Case({'other': measurements.Implementation(lambda: fail)}, [(None, 1)])
    found = measure(comparison._replace(cases=[*comparison.cases[:1], case]), 1)
    assert [each for each in found if isinstance(each, (Check, NotRun))] == [
        NotRun(f'other: {sliding_name(16)}, float32, {passes}',
               'RuntimeError: illegal memory access') for passes in measurements.PASSES]


def measured(name, passes, implementation, milliseconds, dtype='bfloat16'):
    return Measurement(name, dtype, passes, implementation, milliseconds, 1., 0.5)


def test_targets():
    conv, attention = 'ACmixConv2d', sliding_name
    results = [
        measured(conv, 'forward', OURS, 1.), measured(conv, 'forward', REFERENCE, 20.),
        measured(conv, 'forward', OURS, 1., 'float32'),
        measured(conv, 'forward', REFERENCE, 19., 'float32'),
        measured(attention(32), 'forward', OURS, 2.), measured(attention(32), 'forward', COPY, 1.3),
        measured(attention(16), 'forward', OURS, 2.), measured(attention(16), 'forward', FLEX, 1.),
        measured('Swin-T', 'forward', OURS, 99.),
        measured('Swin-T', 'forward', 'plain Swin-T', 100.)]
    found = {each.measure: each[1:] for each in targets(results)}
    reference = 'against the reference'
    assert found[f'{conv}, bfloat16, forward, {reference}'] == ('≥ 20×', '20.0×', True)
    assert found[f'{conv}, float32, forward, {reference}'] == ('≥ 20×', '19.0×', False)
    assert found[f'{conv}, bfloat16, forward + backward, {reference}'] == ('≥ 15×', None, None)
    assert found[f'{attention(32)}, forward, bandwidth against a copy'] == ('≥ 60%', '65%', True)
    assert found[f'{attention(16)}, forward, against {FLEX}'] == ('faster', '0.50×', False)
    assert found['Swin-T, bfloat16 autocast, forward, time relative to plain Swin-T'] == (
        '≤ 1.0×', '0.990×', True)


def test_reports_list_everything():
    results = [measured('ACmixConv2d', 'forward', OURS, 1.),
               measured('ACmixConv2d', 'forward', REFERENCE, 20.)]
    wrong = Check('shift_conv', 'a case', 'triton', 'float16', 'CUDA graph', 0.5, 0.01, 1., None,
                  False)
    report = run.Report('Ran.', 'a GPU', [wrong], results, targets(results),
                        [NotRun(NATTEN, 'missing'), NotRun('Swin-T', 'missing')], 1.5)
    text = as_markdown(report)
    assert '0 of 1 checks passed' in text
    assert '| a case | triton | float16 | CUDA graph | error 5.0e-01, allowed 1e-02 |' in text
    assert '| ACmixConv2d | bfloat16 | forward | reference | 20.000 | 20.00 | 0.50 | 1 |' in text
    assert '- NATTEN; Swin-T: missing' in text
    found = json.loads(as_json(report))
    assert found['checks'][0]['error'] == 0.5
    assert found['measurements'][1]['milliseconds'] == 20.
    assert found['not_run'][0] == {'what': NATTEN, 'why': 'missing'}


@pytest.mark.usefixtures('few_checks')
def test_time_limit():
    *_, report = run.run_all('cpu', 'a test', print, sizes=SIZES, minutes=-1.)
    assert report.checks == report.measurements == []
    assert 'no time was left' in {each.why for each in report.not_run}
    assert any('Swin-T' in each.what for each in report.not_run)


def test_interpreter_is_chosen_before_triton_is_imported(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert run.choose_device() == ('cpu', 'TRITON_INTERPRET=1 is set')
    monkeypatch.delenv('TRITON_INTERPRET')
    monkeypatch.setitem(sys.modules, 'triton', None)
    with pytest.raises(run.UsageError, match='set TRITON_INTERPRET=1'):
        run.choose_device()


@needs_torch('2.6', 'flex_attention, as it is here')
def test_blocks_of_neighbourhoods():
    """Every pair of neighbours lies in a block that is not skipped; both passes read the blocks."""
    from torch.nn.attention.flex_attention import create_block_mask
    height, width = 24, 48
    mask = neighbourhood_mask(height, width, 7, 'cpu')
    expected = create_block_mask(mask.mask_mod, None, None, height * width, height * width, 'cpu',
                                 BLOCK_SIZE=BLOCK)
    assert torch.equal(mask.to_dense(), expected.to_dense())
    for name in ('q_num_blocks', 'q_indices'):
        assert getattr(mask, name).shape == getattr(expected, name).shape
    # 49 neighbours, but for those outside the map.
    rows, columns = (sum(min(i + 3, extent - 1) - max(i - 3, 0) + 1 for i in range(extent))
                     for extent in (height, width))
    index = torch.arange(height * width)
    assert mask.mask_mod(None, None, index[:, None], index).sum() == rows * columns
