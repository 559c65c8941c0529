"""torch's SyncBatchNorm for CPU tensors, so that data-parallel trainings with it can be tested without a GPU.

torch has its five kernels for accelerators only, and two checks that turn CPU modules away. Everything else, the
autograd function with its collectives and the layer itself, stays torch's own. Formulas: Chan et al. 1979 for the
combined variance, Ioffe and Szegedy 2015 for the gradient. Nothing for `torch.compile`.
"""

from unittest import mock

import torch
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

_KERNELS = torch.library.Library("aten", "IMPL", "CPU")


def enable():
    """Register the kernels and lift the checks, in this process, for good."""
    for kernel in (_stats, _gather_stats_with_counts, _elemt, _backward_reduce, _backward_elemt):
        _KERNELS.impl("batch_norm" + kernel.__name__, kernel)
    host_forward = SyncBatchNorm.forward

    def forward(self, input):
        # The check lets CUDA, HPU, XPU and whatever this names pass; torch asks it elsewhere too.
        with mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"):
            return host_forward(self, input)

    SyncBatchNorm.forward = forward
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None  # does nothing but check


def _stats(input, eps):
    variance, mean = torch.var_mean(_wide(input), _all_but_channels(input), correction=0)
    return mean, torch.rsqrt(variance + eps)


def _gather_stats_with_counts(input, mean, invstd, running_mean, running_var, momentum, eps, counts):
    weights = counts.to(mean.dtype)[:, None]
    number = weights.sum()
    combined = (mean * weights).sum(0) / number
    squares = ((invstd**-2 - eps + (mean - combined) ** 2) * weights).sum(0)  # of the distances from the mean
    if running_mean is not None:
        running_mean.lerp_(combined.to(running_mean.dtype), momentum)
        running_var.lerp_((squares / (number - 1)).to(running_var.dtype), momentum)
    return combined, torch.rsqrt(squares / number + eps)


def _elemt(input, weight, bias, mean, invstd, eps):
    found = (_wide(input) - _along(mean, input)) * _along(invstd, input)
    if weight is not None:
        found = found * _along(weight, input) + _along(bias, input)
    return found.to(input.dtype)


def _backward_reduce(grad_out, input, mean, invstd, weight, input_g, weight_g, bias_g):
    sum_dy = _wide(grad_out).sum(_all_but_channels(input))
    sum_dy_xmu = (_wide(grad_out) * (_wide(input) - _along(mean, input))).sum(_all_but_channels(input))
    dtype = sum_dy.dtype if weight is None else weight.dtype
    return sum_dy, sum_dy_xmu, (sum_dy_xmu * invstd).to(dtype), sum_dy.to(dtype)


def _backward_elemt(grad_out, input, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    number = count.sum()
    centred = _wide(input) - _along(mean, input)
    found = _wide(grad_out) - _along(sum_dy / number, input) - centred * _along(invstd**2 * sum_dy_xmu / number, input)
    return (found * _along(invstd if weight is None else invstd * weight, input)).to(input.dtype)


def _wide(values):
    """Half precision is summed in single precision, as the kernels for accelerators do."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _along(values, input):
    return values.view(-1, *[1] * (input.dim() - 2))


def _all_but_channels(input):
    return [0, *range(2, input.dim())]
