"""Compile the Triton kernels without a GPU; run by test_kernels.py without the interpreter."""

import functools

import torch
import triton
from launches import recorded, specialize
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from acmix_mm.ops.path_sum import triton_kernels as sums
from acmix_mm.ops.path_weights import triton_kernels as weights
from acmix_mm.ops.position_bias import triton_kernels as biases
from acmix_mm.ops.position_encoding import triton_kernels as encoding
from acmix_mm.ops.rolling import triton_kernels as rolling
from acmix_mm.ops.shift_conv import triton_kernels as grouped_conv
from acmix_mm.ops.sliding_attention import strip_kernels
from acmix_mm.ops.sliding_attention import triton_kernels as sliding_attention
from acmix_mm.ops.window_attention import triton_kernels as window_attention


def compile_all():
    """Compile each kernel for two GPUs and several dtypes and widths; print its shared memory."""
    for capability in (80, 90):
        for dtype, head_dims in ((torch.bfloat16, 16), (torch.bfloat16, 128), (torch.float32, 64),
                                 (torch.float32, 128)):
            tiling = sliding_attention.Tiling(
                torch.empty(1, 1, 1, 1, head_dims, dtype=dtype, device='meta'), 7, 1, 1)
            for kernel in (sliding_attention.attend_kernel, sliding_attention.grad_queries_kernel):
                compile_kernel(kernel, dtype, tiling.constants(tiling.keys_across), capability)
            compile_kernel(sliding_attention.grad_keys_kernel, dtype,
                           tiling.constants(tiling.queries_across), capability)
        for dtype, head_dims in ((torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float32, 16)):
            queries = torch.empty(1, 8, 8, 1, head_dims, dtype=dtype, device='meta')
            for kernel in (strip_kernels.attend_kernel, strip_kernels.grad_queries_kernel,
                           strip_kernels.grad_keys_kernel):
                compile_kernel(kernel, dtype, strip_kernels.constants(queries, 7), capability)
        for dtype, side in ((torch.bfloat16, 7), (torch.float32, 12)):
            qkv = torch.empty(1, 8, 8, 3, 1, 32, dtype=dtype, device='meta')
            tiling = window_attention.Tiling(qkv, (side, side), 3, False, False)
            compile_kernel(window_attention.attend_kernel, dtype, tiling.constants, capability)
            compile_kernel(window_attention.grad_queries_kernel, dtype, tiling.backward_constants,
                           capability)
            if tiling.blocks > 1:
                compile_kernel(window_attention.grad_keys_kernel, dtype,
                               tiling.backward_constants, capability)
        for dtype in (torch.bfloat16, torch.float32):
            conv = dict(IN_CHANNELS=12, KERNEL_SIZE=3, STRIDE=1, DILATION=1,
                        **grouped_conv.tiling(16, 4))
            for transposed in (False, True):
                directed = dict(TRANSPOSED=transposed, HAS_BIAS=not transposed, **conv)
                compile_kernel(grouped_conv.convolve_kernel, dtype, directed, capability)
            compile_kernel(grouped_conv.grad_kernels_kernel, dtype, conv, capability)


def compile_launches():
    """Compile the kernels that the small operators launch, with and without optional arguments."""
    for run in (weigh, add, encode, bias, roll, fold):
        name = run.__name__
        for _, kernel, arguments, constants in recorded((
                weights, sums, encoding, biases, rolling, window_attention, sliding_attention),
                functools.partial(run, functools.partial(torch.empty, dtype=torch.bfloat16,
                                                         device='meta'))):
            source, _, _ = specialize(kernel, arguments, constants)
            for capability in (80, 90):
                compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32),
                                          options={key: constants[key] for key in ('num_warps',)
                                                   if key in constants})
                print(kernel.__name__, name, capability, compiled.metadata.shared)


def weigh(empty):
    for is_grouped in (False, True):
        for exists in (False, True):
            rate, bias = (empty(shape) if exists else None for shape in (1, 96))
            inputs = (empty(288, 96), empty(288) if exists else None, empty(9, 9),
                      empty(96, 9, 3, 3), empty(9) if exists else None, rate, rate, bias)
            kernels = empty(96, 72 if is_grouped else 96, 3, 3)
            outs = (inputs[0], inputs[1], empty(288, 96) if is_grouped else None, kernels,
                    torch.empty(96, 9, device='meta') if exists else None)
            group = 8 if is_grouped else 0
            weights.compose(inputs, outs, group)
            weights.compose_backward(outs, inputs, inputs, group)


def add(empty):
    maps, images = empty(1, 8, 8, 96), empty(1, 96, 8, 8).permute(0, 2, 3, 1)
    for taps in (None, torch.empty(96, 9, device='meta')):
        sums.add(maps, maps, taps, images, (8, 8), 1, 1, 1, taps is None)
        sums.add_backward(maps, maps, taps, (8, 8), 1, 1, 1)
    sums.add_backward(images, maps, taps, (8, 8), 1, 1, 1)
    sums.add_backward(maps, None, taps, (8, 8), 1, 1, 0)


def encode(empty):
    maps = torch.empty(8, 8, 24, device='meta')
    encoding.encode(empty(24, 2), empty(24), maps)
    encoding.encode_backward(maps, empty(24, 2), empty(24))


def bias(empty):
    biases.sum_offsets(empty(3, 49, 49), empty(169, 3), (7, 7))
    window_attention.fill_biases(empty(49, 49, 3).permute(2, 0, 1),
                                 torch.empty(4, 3, 64, 64, device='meta'), (7, 7), 3)


def roll(empty):
    rolling.roll(empty(1, 8, 8, 96), torch.empty(1, 8, 8, 96, device='meta'), 3)


def fold(empty):
    for stride in (1, 2):
        sliding_attention.fold(empty(2, 1, 14, 14, 3, 32), empty(1, 8, 8, 3, 3, 32), 3, stride)


def compile_kernel(kernel, dtype, constants, capability):
    name = {torch.bfloat16: 'bf16', torch.float32: 'fp32'}[dtype]
    constants = dict(constants)
    options = {key: constants.pop(key) for key in ('num_warps', 'num_stages', 'maxnreg')
               if key in constants}
    pointers = dict.fromkeys(('q', 'k', 'keys', 'v', 'out', 'grad_out', 'grad_q', 'grad_k',
                              'grad_v', 'maps', 'grads', 'qkv', 'grad_qkv'), f'*{name}')
    pointers.update(dict.fromkeys(('positions', 'log_sum', 'mean', 'weights', 'bias', 'partial',
                                   'biases', 'padding', 'grad_bias'), '*fp32'), scale='fp32')
    signature = {argument: 'constexpr' if argument in constants else pointers.get(argument, 'i32')
                 for argument in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants),
                              target=GPUTarget('cuda', capability, 32), options=options)
    print(kernel.__name__, name, capability, compiled.metadata.shared)


if __name__ == '__main__':
    compile_all()
    compile_launches()
