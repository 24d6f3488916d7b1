"""The report as JSON and as Markdown."""

import json
from collections.abc import Sequence

from acmix_mm.gpu_check.checks import Check, NotRun
from acmix_mm.gpu_check.measurements import OURS, Measurement
from acmix_mm.gpu_check.run import Report
from acmix_mm.gpu_check.targets import Target
from acmix_mm.utils import markdown


def as_json(report: Report) -> str:
    """All results, as lists of objects."""
    values = report._asdict()
    for name in ('checks', 'measurements', 'targets', 'not_run'):
        values[name] = [each._asdict() for each in values[name]]
    return json.dumps(values, indent=2, ensure_ascii=False)


def as_markdown(report: Report) -> str:
    """All results; the checks are summarised."""
    passed = len(report.checks) - len(report.failures)
    parts = ['# GPU check', f'{report.statement} {passed} of {len(report.checks)} checks passed. '
             f'{report.machine}; {report.minutes:.1f} minutes.']
    if report.failures:
        parts += ['## Failures', failures_table(report.failures)]
    parts += ['## Targets', 'On an H200, batch 8, maps of 200×336, images of 800×1344.',
              targets_table(report.targets), '## Checks',
              'Against the reference in float64, output and all gradients.',
              checks_table(report.checks)]
    if report.measurements:
        parts += ['## Measurements', measurements_table(report.measurements)]
    if report.not_run:
        parts += ['## Not run', not_run_list(report.not_run)]
    return '\n\n'.join(parts) + '\n'


def targets_table(targets: Sequence[Target]) -> str:
    rows = [['measure', 'target', 'measured', 'met']]
    for each in targets:
        met = {None: '', True: 'yes', False: 'no'}[each.met]
        rows.append([each.measure, each.target, each.value or 'not measured', met])
    return markdown.table(rows)


def failures_table(failures: Sequence[Check]) -> str:
    rows = [['name', 'case', 'backend', 'dtype', 'mode', 'why']]
    for each in failures:
        why = each.message or f'error {each.error:.1e}, allowed {each.tolerance:.0e}'
        rows.append([each.name, each.case, each.backend, each.dtype, each.mode,
                     why.replace('|', r'\|')])
    return markdown.table(rows)


def checks_table(checks: Sequence[Check]) -> str:
    """One row for all cases of an operator or layer with a backend, a dtype and a mode."""
    groups: dict[tuple[str, ...], list[Check]] = {}
    for each in checks:
        groups.setdefault((each.name, each.backend, each.dtype, each.mode), []).append(each)
    rows = [['name', 'backend', 'dtype', 'mode', 'passed', 'largest error', 'allowed', 'seconds']]
    for names, group in groups.items():
        errors = [each.error for each in group if each.error is not None]
        rows.append([*names, f'{sum(each.passed for each in group)} of {len(group)}',
                     f'{max(errors):.1e}' if errors else '',
                     f'{max(each.tolerance for each in group):.0e}',
                     f'{sum(each.seconds for each in group):.1f}'])
    return markdown.table(rows)


def measurements_table(measurements: Sequence[Measurement]) -> str:
    """Times, relative to ours as well."""
    ours = {(each.name, each.dtype, each.passes): each.milliseconds for each in measurements
            if each.implementation == OURS}
    rows = [['name', 'dtype', 'pass', 'implementation', 'milliseconds', f'relative to {OURS}',
             'of a copy', 'peak MiB']]
    for each in measurements:
        base = ours[each.name, each.dtype, each.passes]
        rows.append([each.name, each.dtype, each.passes, each.implementation,
                     f'{each.milliseconds:.3f}', f'{each.milliseconds / base:.2f}',
                     f'{each.of_copy:.2f}', f'{each.mebibytes:.0f}'])
    return markdown.table(rows)


def not_run_list(not_run: Sequence[NotRun]) -> str:
    """One item for each reason."""
    reasons: dict[str, list[str]] = {}
    for each in not_run:
        reasons.setdefault(each.why, []).append(each.what)
    return '\n'.join(f'- {"; ".join(whats)}: {why}' for why, whats in reasons.items())
