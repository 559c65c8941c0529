"""What `sync_batchnorm_on_cpu` adds to torch is right: SyncBatchNorm on parts of a batch is BatchNorm on all of it."""

from tests.fixtures_peers import data_parallel

PARTS = """
import copy
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tests.integration import sync_batchnorm_on_cpu

ours = range(0, 4) if rank == 0 else range(4, 10)  # parts need not be equal


def compare(options, memory_format, dtype):
    torch.manual_seed(0)
    images = (torch.randn(10, 3, 5, 4) * 3 + 7).to(dtype).contiguous(memory_format=memory_format)
    weights = torch.randn_like(images)
    whole = nn.Sequential(nn.BatchNorm2d(3, **options), nn.GELU(), nn.BatchNorm2d(3, **options))
    for value in (*whole.parameters(), *whole.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.5, 2.0)
    if dtype is torch.float64:
        whole.double()
    parts = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
    trained = DistributedDataParallel(parts) if options.get("affine", True) else parts
    wanted_input, found_input = images.clone().requires_grad_(), images[ours].clone().requires_grad_()
    for _ in range(3):
        wanted, found = whole(wanted_input), trained(found_input)
        (wanted * weights).sum().backward()
        (found * weights[ours]).sum().backward()
    tolerance = 1e-9 if dtype is torch.float64 else 0.05
    close = lambda a, b: torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    return {
        "output": close(found, wanted[ours]) and found.dtype is dtype,
        "memory format": found.is_contiguous(memory_format=memory_format),
        "gradient of the input": close(found_input.grad, wanted_input.grad[ours]),
        "gradients": [close(p.grad * size, q.grad) for p, q in zip(parts.parameters(), whole.parameters())],
        "buffers": [close(p, q) for p, q in zip(parts.buffers(), whole.buffers())],
    }


for what in (lambda layer: layer(torch.randn(4, 3, 2, 2)), DistributedDataParallel):
    try:
        what(nn.SyncBatchNorm(3))
    except ValueError as error:
        answer.setdefault("stock torch", []).append(str(error))
sync_batchnorm_on_cpu.enable()
for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        answer[f"{options} {memory_format}"] = compare(options, memory_format, torch.float64)
answer["{} in half precision"] = compare({}, torch.channels_last, torch.bfloat16)
"""


def test_two_workers_with_parts_of_a_batch_compute_what_one_batchnorm_does_with_all_of_it(tmp_path):
    for answer in data_parallel(tmp_path, PARTS):
        # Should torch learn it, the helper can go.
        gpu, modules = answer.pop("stock torch")
        assert gpu.startswith("SyncBatchNorm expected input tensor to be on GPU")
        assert modules == "SyncBatchNorm layers only work with GPU modules"
        assert len(answer) == 9
        for case, found in answer.items():
            assert found == {
                "output": True,
                "memory format": True,
                "gradient of the input": True,
                "gradients": [] if "affine" in case else [True] * 4,
                "buffers": [] if "track_running_stats" in case else [True] * 6,
            }, case
