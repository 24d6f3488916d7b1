"""What the tests need from the installed stack, and why they are skipped without it."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from acmix_mm.environment import TORCH_VERSION, export_unavailable, versions
from acmix_mm.ops.backend import has_triton, triton_unavailable


def needs_torch(release, what):
    """Skip a test with an older torch, which lacks something, such as needs_torch('2.4', …)."""
    is_old = tuple(map(int, release.split('.'))) > TORCH_VERSION
    return pytest.mark.skipif(is_old, reason=f'{what} needs torch {release}')


needs_custom_ops = needs_torch('2.4', 'torch.compile with custom ops')
needs_triton = pytest.mark.skipif(not has_triton(), reason='needs triton 3')
needs_export = pytest.mark.skipif(export_unavailable() is not None,
                                  reason=f'export to ONNX {export_unavailable()}')


def is_pinned():
    """Whether the installed packages are those of the pinned stack."""
    installed = {f'{name}=={version}' for name, version in versions().items()
                 if name != 'acmix_mm'}
    return installed <= set((ROOT / 'constraints/pinned.txt').read_text().splitlines())


needs_pinned = pytest.mark.skipif(not is_pinned(), reason='is about constraints/pinned.txt')


def float16_unavailable():
    """Why the operators do not run in float16 on the CPU, or None if they do."""
    try:
        ones = torch.ones(1, 1, 1, 1, dtype=torch.float16)
        F.conv2d(ones @ ones, ones)
    except RuntimeError as error:
        return f'torch {torch.__version__} has no float16 on CPUs: {error}'
    return None


# With these, a CPU computes in half precision.
HALF_DTYPES = [torch.bfloat16, *([] if float16_unavailable() else [torch.float16])]


def skip_unavailable(items):
    """Skip the tests that are parametrised with a dtype or a backend that this stack lacks."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons[torch.float16] = reasons['float16'] = float16_unavailable()
    if not has_triton():
        reasons['triton'] = triton_unavailable(torch.float32)
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, 'callspec') else ()
        for each in parameters:
            if isinstance(each, (str, torch.dtype)) and reasons.get(each) is not None:
                item.add_marker(pytest.mark.skip(reason=reasons[each]))
