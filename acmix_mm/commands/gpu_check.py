"""Verify and measure the kernels and layers on a GPU.

Compares every kernel and both layers with the reference implementation: in float32, bfloat16 and
float16, at borders, with strides, dilations and shifts, under autocast, torch.compile and CUDA
graph capture. Then measures operators, layers and Swin-T against their baselines, and prints
whether the targets for an H200 are met. Takes up to 8 minutes, and needs torch and Triton only;
what needs other packages is listed if they are missing.

Without a GPU, the kernels run in Triton's interpreter, on small inputs. The exit status is 1 if a
comparison failed. A target that is missed is no failure.

Example: %(prog)s --json work_dirs/gpu_check.json --markdown work_dirs/gpu_check.md
"""

import argparse
import functools
import sys

from acmix_mm.gpu_check.report import (
    as_json,
    as_markdown,
    failures_table,
    not_run_list,
    targets_table,
)
from acmix_mm.gpu_check.run import choose_device, run_all
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.output_paths import file_to_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('--json', metavar='FILE', default='gpu_check.json',
                        help='all results (default: gpu_check.json)')
    parser.add_argument('--markdown', metavar='FILE', default='gpu_check.md',
                        help='the results as tables (default: gpu_check.md)')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    outputs = ((file_to_write(args.json), as_json), (file_to_write(args.markdown), as_markdown))
    device, why_cpu = choose_device()
    for report in run_all(device, why_cpu, functools.partial(print, flush=True)):
        # What has been found is kept, should the GPU hang.
        for path, text_of in outputs:
            with atomic_write(path) as temporary:
                temporary.write_text(text_of(report), encoding='utf-8')
    passed = len(report.checks) - len(report.failures)
    parts = [targets_table(report.targets), f'Not run:\n{not_run_list(report.not_run)}',
             f'{report.statement} {passed} of {len(report.checks)} checks passed.',
             f'Written: {args.json}, {args.markdown}']
    if report.failures:
        parts.insert(0, f'Failures:\n{failures_table(report.failures)}')
    print('', *parts, sep='\n\n')
    if report.failures:
        sys.exit(1)
