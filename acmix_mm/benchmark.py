"""Timing rivals against each other, and the memory that each of them takes.

Rivals of a case run turn and turn about in one process, so that a machine that drifts drifts for
all; memory is taken in a fresh process for each, as the peak above what was there before the call.
"""

import ctypes
import functools
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

PASSES = ('forward', 'forward + backward')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
# Calls that one timing on a GPU has, so that its clock's grain does not matter.
GPU_CALLS = 10


class Case(NamedTuple):
    """Rivals by name, the slower or plain one first, and the shapes of the inputs they all take.

    A rival builds what is timed: a function from the inputs to tensors, or a module. An axis that
    is None is the batch.
    """

    rivals: dict[str, Callable[[], Callable]]
    shapes: Sequence[Sequence[Optional[int]]]


class Setting(NamedTuple):
    """Where, in which dtype (a key of ``DTYPES``) and on how many pictures a case runs."""

    device: str = 'cpu'
    dtype: str = 'float32'
    batch: int = 1

    def inputs(self, case: Case, requires_grad: bool) -> list[Tensor]:
        return [torch.randn([self.batch if axis is None else axis for axis in shape],
                            device=self.device, dtype=DTYPES[self.dtype],
                            requires_grad=requires_grad) for shape in case.shapes]

    def build(self, rival: Callable[[], Callable]) -> Callable:
        built = rival()
        if isinstance(built, nn.Module):
            built.to(self.device, DTYPES[self.dtype])
        return built


class Result(NamedTuple):
    """Median seconds of one call of a rival, and its peak memory in MiB.

    On a GPU, ``gigabytes_per_second`` is the bandwidth it attains if every input is read and every
    output written once (backwards: and inputs and output gradients read, and input gradients
    written), and ``of_copy`` is that over what a copy of as many bytes attains.
    """

    case: str
    passes: str
    rival: str
    seconds: float
    mebibytes: float
    gigabytes_per_second: Optional[float] = None
    of_copy: Optional[float] = None


class OnBackend(nn.Module):
    """A layer whose operators run on the named backend, if they have it."""

    def __init__(self, layer: nn.Module, backend: Optional[str]) -> None:
        super().__init__()
        self.layer, self.backend = layer, backend

    def forward(self, x: Tensor) -> Tensor:
        from acmix_mm.ops import use_backend
        with use_backend(self.backend):
            return self.layer(x)


def sliding_attention(backend: Optional[str]) -> Callable[[Tensor, Tensor], Tensor]:
    from acmix_mm.ops import sliding_window_attention
    return functools.partial(sliding_window_attention, kernel_size=7, backend=backend)


def shift_conv(backend: Optional[str]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from acmix_mm.ops import shift_conv as operator

    def run(qkv: Tensor, fc_weight: Tensor, shift_weight: Tensor) -> Tensor:
        maps = qkv.flatten(3, 4).permute(0, 3, 4, 1, 2)
        return operator(maps, fc_weight, shift_weight, backend=backend)
    return run


def window_attention(backend: Optional[str]) -> Callable[[Tensor, Tensor], Tensor]:
    from acmix_mm.ops import window_attention as operator
    return functools.partial(operator, window_size=(7, 7), shift_size=3, backend=backend)


def acmix_conv(backend: Optional[str]) -> nn.Module:
    from acmix_mm.layers import ACmixConv2d
    return OnBackend(ACmixConv2d(64, 64), backend)


def window_acmix(mix: str) -> nn.Module:
    from acmix_mm.layers import WindowACmix
    return WindowACmix(96, 3, window_size=7, shift_size=3, mix=mix)


def swin_tiny(acmix: bool) -> nn.Module:
    if acmix:
        from acmix_mm.backbones import ACmixSwinTransformer as Backbone
    else:
        from mmdet.models.backbones.swin import SwinTransformer as Backbone
    return Backbone(drop_path_rate=0.)


class FirstBlocks(nn.Module):
    """The two blocks of a Swin-T's first stage, on (batch, height · width, 96)."""

    def __init__(self, acmix: bool, height: int, width: int) -> None:
        super().__init__()
        self.blocks = swin_tiny(acmix).stages[0].blocks
        self.hw_shape = height, width

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.hw_shape)
        return x


class MaskRCNN(nn.Module):
    """MMDetection's Mask R-CNN with a Swin-T, up to what its heads say of every proposal."""

    def __init__(self, acmix: bool) -> None:
        super().__init__()
        from mmdet.utils import register_all_modules
        from mmengine.hub import get_config
        from mmengine.registry import MODELS
        register_all_modules()
        cfg = get_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
        if acmix:
            cfg.model.backbone.type = 'ACmixSwinTransformer'
        cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.)
        self.detector = MODELS.build(cfg.model)

    def forward(self, x: Tensor) -> list[Tensor]:
        from mmdet.structures import DetDataSample
        size = tuple(x.shape[2:])
        samples = [DetDataSample(metainfo=dict(img_shape=size, scale_factor=(1., 1.)))
                   for _ in range(len(x))]
        return [out for out in self.detector(x, samples, mode='tensor') if isinstance(out, Tensor)]


def forms_case(build: Callable, rival: str, *shapes: Sequence[Optional[int]]) -> Case:
    """The form that an operator chooses against another one."""
    return Case({f'form {rival}': functools.partial(build, rival),
                 'as chosen': functools.partial(build, None)}, shapes)


def conv_case(height: int, width: int) -> Case:
    return Case(dict(reference=functools.partial(acmix_conv, 'reference'),
                     ACmixConv2d=functools.partial(acmix_conv, None)), [(None, 64, height, width)])


def against_swin(build: Callable, *shape: Optional[int]) -> Case:
    return Case({'plain Swin': functools.partial(build, False),
                 'ACmix-Swin': functools.partial(build, True)}, [shape])


# The first seven need torch alone, blocks and backbones MMDetection, the detector mmcv's operators.
CASES = {
    'sliding-attention': forms_case(sliding_attention, 'reference', (None, 200, 336, 3, 4, 16),
                                    (200, 336, 16)),
    'shift-conv': forms_case(shift_conv, 'reference', (None, 200, 336, 3, 4, 16), (9, 12),
                             (64, 9, 3, 3)),
    'window-attention': forms_case(window_attention, 'sdpa', (None, 224, 336, 3, 3, 32),
                                   (3, 49, 49)),
    'conv-100x168': conv_case(100, 168),
    'conv-200x336': conv_case(200, 336),
    'conv-400x672': conv_case(400, 672),
    'window-acmix': Case({'attention alone': functools.partial(window_acmix, 'attn'),
                          'both paths': functools.partial(window_acmix, 'acmix')},
                         [(None, 224, 336, 96)]),
    'swin-blocks': against_swin(functools.partial(FirstBlocks, height=224, width=336),
                                None, 224 * 336, 96),
    'swin-t-896x1344': against_swin(swin_tiny, None, 3, 896, 1344),
    'swin-t-800x1344': against_swin(swin_tiny, None, 3, 800, 1344),
    'mask-rcnn-800x1344': against_swin(MaskRCNN, None, 3, 800, 1344),
}


def step(run: Callable, inputs: Sequence[Tensor], passes: str) -> list[Tensor]:
    """Run once, forward or forward and backward, and return the outputs."""
    with torch.set_grad_enabled(passes != 'forward'):
        out = run(*inputs)
    outs = [out] if isinstance(out, Tensor) else list(out)
    if passes != 'forward':
        torch.autograd.backward(outs, [torch.ones_like(each) for each in outs])
    return outs


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Time one call; the call before it, which is not counted, finds its memory and its caches."""
    run()
    if device == 'cpu':
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(GPU_CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / GPU_CALLS


def compare(name: str, passes: str, setting: Setting, repeats: int) -> list[Result]:
    """Time the rivals of a case turn and turn about, and take the memory of each."""
    case = CASES[name]
    inputs = setting.inputs(case, requires_grad=passes != 'forward')
    runs = {rival: functools.partial(step, setting.build(build), inputs, passes)
            for rival, build in case.rivals.items()}
    outputs = {rival: sum(out.nbytes for out in run()) for rival, run in runs.items()}
    seconds: dict[str, list[float]] = {rival: [] for rival in runs}
    for _ in range(repeats):
        for rival, run in runs.items():
            seconds[rival].append(seconds_of(run, setting.device))
    results = []
    for rival in runs:
        result = Result(name, passes, rival, statistics.median(seconds[rival]),
                        peak_memory(name, passes, rival, setting))
        if setting.device != 'cpu':
            result = with_bandwidth(result, sum(each.nbytes for each in inputs), outputs[rival])
        results.append(result)
    return results


def with_bandwidth(result: Result, input_bytes: int, output_bytes: int) -> Result:
    """Add what was read and written per second, and its ratio to a copy of as many bytes."""
    moved = input_bytes + output_bytes
    if result.passes != 'forward':
        moved += 2 * input_bytes + output_bytes
    source = torch.empty(moved // 2, dtype=torch.uint8, device='cuda')
    target = torch.empty_like(source)
    copy_seconds = seconds_of(lambda: target.copy_(source), 'cuda')
    return result._replace(gigabytes_per_second=moved / result.seconds / 1e9,
                           of_copy=copy_seconds / result.seconds)


def peak_memory(name: str, passes: str, rival: str, setting: Setting) -> float:
    """Measure one rival in a process of its own; see :func:`report_peak_memory`. Linux alone."""
    code = (f'import acmix_mm.benchmark as b; b.report_peak_memory({name!r}, {passes!r}, {rival!r},'
            f' b.Setting{tuple(setting)!r})')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def report_peak_memory(name: str, passes: str, rival: str, setting: Setting) -> None:
    """Print by how many MiB a pass, not the first, raises this process's memory, or the GPU's."""
    case = CASES[name]
    run = setting.build(case.rivals[rival])
    inputs = setting.inputs(case, requires_grad=passes != 'forward')
    # What the first call loads for good is not the pass's own.
    step(run, inputs, passes)
    peak = PeakMemory(setting.device)
    step(run, inputs, passes)
    print(peak.mebibytes())


class PeakMemory:
    """By how much what follows raises this process's memory, or the GPU's. On a CPU Linux alone.

    Args:
        device: ``'cpu'`` or a GPU.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == 'cpu':
            # What was freed and kept for later would hide what is taken.
            ctypes.CDLL(None).malloc_trim(0)
            with open('/proc/self/clear_refs', 'w') as peak:
                peak.write('5')
            self.idle = resident('VmRSS')
        else:
            torch.cuda.reset_peak_memory_stats()
            self.idle = torch.cuda.memory_allocated() / 2**20

    def mebibytes(self) -> float:
        """The peak so far, above what was there at the start."""
        if self.device == 'cpu':
            return resident('VmHWM') - self.idle
        return torch.cuda.max_memory_allocated() / 2**20 - self.idle


def resident(entry: str) -> float:
    """MiB of an entry of this process's status, ``VmRSS`` or ``VmHWM``."""
    with open('/proc/self/status') as status:
        return int(re.search(rf'{entry}:\s+(\d+) kB', status.read()).group(1)) / 1024


def machine(setting: Setting) -> str:
    """One line for the table: where it was measured, and with which torch."""
    return (f'{time.strftime("%Y-%m-%d")}, {processor(setting.device)}, torch {torch.__version__}, '
            f'{setting.dtype}, batch {setting.batch}')


def processor(device: str) -> str:
    """The name of the GPU, or of the CPU and how many threads of it torch uses."""
    if device != 'cpu':
        return torch.cuda.get_device_name()
    with open('/proc/cpuinfo') as info:
        names = re.findall(r'model name\s*: (.+)', info.read())
    threads = torch.get_num_threads()
    return f'{names[0] if names else platform.machine()}, {threads} thread{"s" * (threads != 1)}'


def table(results: list[Result]) -> str:
    """The results as a Markdown table, with each rival's ratio to the first of its case."""
    on_gpu = any(result.of_copy is not None for result in results)
    heads = ['case', 'pass', 'rival', 'milliseconds', 'ratio', 'peak MiB', 'ratio']
    heads += ['GB/s', 'of a copy'] if on_gpu else []
    lines = ['| ' + ' | '.join(heads) + ' |', '|' + '---|' * len(heads)]
    first: dict[tuple[str, str], Result] = {}
    for result in results:
        base = first.setdefault((result.case, result.passes), result)
        cells = [result.case, result.passes, result.rival, f'{1000 * result.seconds:.2f}',
                 f'{result.seconds / base.seconds:.3f}', f'{result.mebibytes:.0f}',
                 f'{result.mebibytes / base.mebibytes:.3f}']
        if on_gpu:
            cells += [f'{result.gigabytes_per_second:.0f}', f'{result.of_copy:.3f}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
