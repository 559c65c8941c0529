"""A stand-in for timm's train.py, for the demo and the tests: it is neither part of timm nor derived from its file.

It has the module-level names and calls of that script (parser, _parse_args, create_dataset, ClassificationTask,
create_optimizer_v2, train_one_epoch, validate, main) and so much of its flags as embedded trainings need, on top of
timm's own loaders, tasks, schedulers and checkpoints. `timm-codistill` treats both files alike; train with timm's.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
from collections import OrderedDict
from pathlib import Path

import torch
import yaml
from timm import utils
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    LogitDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from torch import nn

_logger = logging.getLogger("train")

config_parser = argparse.ArgumentParser(description="config file", add_help=False)
config_parser.add_argument("-c", "--config", default="", metavar="FILE", help="YAML file with defaults")

parser = argparse.ArgumentParser(description="A small train.py, in the shape of timm's")
parser.add_argument("data", nargs="?", metavar="DIR", help="the same as --data-dir")
parser.add_argument("--data-dir", metavar="DIR", help="root of the data set")
parser.add_argument("--dataset", default="", help="kind and name of the data set; empty: a folder of images")
parser.add_argument("--train-split", default="train")
parser.add_argument("--val-split", default="validation")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--num-classes", type=int, default=None)
parser.add_argument("--input-size", default=None, nargs=3, type=int, metavar="N")
parser.add_argument("-b", "--batch-size", type=int, default=128)
parser.add_argument("--device", default="cuda")
parser.add_argument("--channels-last", action="store_true")
parser.add_argument("--amp", action="store_true")
parser.add_argument("--amp-dtype", default="float16")
parser.add_argument("--torchcompile", nargs="?", default=None, const="inductor")
parser.add_argument("--grad-accum-steps", type=int, default=1)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--weight-decay", type=float, default=2e-5)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--sched-on-updates", action="store_true")
parser.add_argument("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="epochs, for multistep")
parser.add_argument("--decay-rate", type=float, default=0.1)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--warmup-epochs", type=int, default=0)
parser.add_argument("--warmup-lr", type=float, default=1e-5)
parser.add_argument("--min-lr", type=float, default=0.0)
parser.add_argument("--no-aug", action="store_true")
parser.add_argument("--scale", type=float, nargs="+", default=[0.08, 1.0], help="area of a random crop, from and to")
parser.add_argument("--hflip", type=float, default=0.5)
parser.add_argument("--color-jitter", type=float, default=0.4)
parser.add_argument("--aa", default=None, help="AutoAugment policy")
parser.add_argument("--aug-splits", type=int, default=0)
parser.add_argument("--jsd-loss", action="store_true")
parser.add_argument("--bce-loss", action="store_true")
parser.add_argument("--mixup", type=float, default=0.0)
parser.add_argument("--cutmix", type=float, default=0.0)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--drop", type=float, default=0.0)
parser.add_argument("--sync-bn", action="store_true")
parser.add_argument("--split-bn", action="store_true")
parser.add_argument("--dist-bn", default="reduce")
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--model-ema-decay", type=float, default=0.9998)
parser.add_argument("--kd-model-name", default=None, help="distil from this network instead")
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--sampler-seed", type=int, default=None, help="of the images' order with several workers; else 0")
parser.add_argument("-j", "--workers", type=int, default=4)
parser.add_argument("--no-prefetcher", action="store_true")
parser.add_argument("--log-interval", type=int, default=50)
parser.add_argument("--val-interval", type=int, default=1, help="epochs between two validations")
parser.add_argument("--recovery-interval", type=int, default=0)
parser.add_argument("--checkpoint-hist", type=int, default=10)
parser.add_argument("--resume", default="", metavar="PATH")
parser.add_argument("--output", default="output/train")
parser.add_argument("--experiment", default="stand-in")


def _parse_args():
    given, rest = config_parser.parse_known_args()
    if given.config:
        parser.set_defaults(**yaml.safe_load(Path(given.config).read_text(encoding="utf-8")))
    args = parser.parse_args(rest)
    return args, yaml.safe_dump(vars(args), default_flow_style=False)


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    args.prefetcher = not args.no_prefetcher
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = build_model(args, device)
    loader_train, loader_eval, mixup_fn = build_loaders(args, resolve_data_config(vars(args), model=model), device)
    task = build_task(args, model, device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args))
    start_epoch = prepare(args, task, optimizer, device)

    output_dir = saver = None
    if utils.is_primary(args):
        output_dir = utils.get_outdir(args.output, args.experiment)
        saver = utils.CheckpointSaver(
            model=task.get_trainable_module(),
            optimizer=optimizer,
            args=args,
            checkpoint_dir=output_dir,
            recovery_dir=output_dir,
            max_history=args.checkpoint_hist,
            task=task,
        )
        Path(output_dir, "args.yaml").write_text(args_text, encoding="utf-8")

    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    if start_epoch > 0:
        scheduler.step(start_epoch)
    autocast = contextlib.suppress
    if args.amp:
        autocast = functools.partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    results, best = [], None
    for epoch in range(start_epoch, epochs):
        if args.distributed:
            loader_train.sampler.set_epoch(epoch)
        train_metrics = train_one_epoch(
            epoch,
            task.get_trainable_module(),
            loader_train,
            optimizer,
            args,
            task=task,
            device=device,
            lr_scheduler=scheduler,
            saver=saver,
            output_dir=output_dir,
            amp_autocast=autocast,
            mixup_fn=mixup_fn,
            num_updates_total=epochs * updates_per_epoch,
        )
        if args.distributed and args.dist_bn:
            utils.distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == "reduce")
        if (epoch + 1) % args.val_interval and epoch + 1 < epochs:
            scheduler.step(epoch + 1)
            continue
        eval_metrics = validate(task.get_eval_model(), loader_eval, nn.CrossEntropyLoss(), args, device, autocast)
        if task.has_ema():
            if args.distributed and args.dist_bn:
                utils.distribute_bn(task.get_trainable_module(ema=True), args.world_size, args.dist_bn == "reduce")
            ema_model = task.get_eval_model(ema=True)
            eval_metrics = validate(ema_model, loader_eval, nn.CrossEntropyLoss(), args, device, autocast)
        if output_dir is not None:
            lr = optimizer.param_groups[0]["lr"]
            summary = os.path.join(output_dir, "summary.csv")
            utils.update_summary(epoch, train_metrics, eval_metrics, summary, lr=lr, write_header=best is None)
            best, _ = saver.save_checkpoint(epoch, metric=eval_metrics["top1"])
        scheduler.step(epoch + 1, eval_metrics["top1"])
        results.append({"epoch": epoch, "train": train_metrics, "validation": eval_metrics})
    if args.distributed:
        torch.distributed.destroy_process_group()
    if output_dir is not None:
        print(f"--result\n{json.dumps(results[-10:], indent=4)}")


def build_model(args, device):
    model = create_model(args.model, num_classes=args.num_classes, drop_rate=args.drop, **args.model_kwargs)
    args.num_classes = model.num_classes
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        args.dist_bn = ""
        model = convert_sync_batchnorm(model)
    return model


def build_loaders(args, data_config, device):
    """The loaders of both splits, and what mixes batches when the loader does not."""
    datasets = {}
    for name, training in ((args.train_split, True), (args.val_split, False)):
        root = args.data_dir or args.data
        datasets[training] = create_dataset(args.dataset, root=root, split=name, is_training=training, seed=args.seed)
    collate_fn = mixup_fn = None
    if args.mixup > 0 or args.cutmix > 0:
        mixing = {
            "mixup_alpha": args.mixup,
            "cutmix_alpha": args.cutmix,
            "label_smoothing": args.smoothing,
            "num_classes": args.num_classes,
        }
        if args.prefetcher:
            collate_fn = FastCollateMixup(**mixing)
        else:
            mixup_fn = Mixup(**mixing)
    if args.aug_splits > 1:
        datasets[True] = AugMixDataset(datasets[True], num_splits=args.aug_splits)
    shared = {
        "input_size": data_config["input_size"],
        "interpolation": data_config["interpolation"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "use_prefetcher": args.prefetcher,
        "distributed": args.distributed,
        "device": device,
    }
    loader_train = create_loader(
        datasets[True],
        is_training=True,
        no_aug=args.no_aug,
        scale=args.scale,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        num_aug_splits=args.aug_splits,
        collate_fn=collate_fn,
        **shared,
    )
    if args.distributed and args.sampler_seed is not None:
        loader_train.sampler.seed = args.sampler_seed
    loader_eval = create_loader(datasets[False], is_training=False, crop_pct=data_config["crop_pct"], **shared)
    return loader_train, loader_eval, mixup_fn


def build_task(args, model, device):
    if args.jsd_loss:
        criterion = JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    elif args.bce_loss:
        criterion = BinaryCrossEntropy(smoothing=args.smoothing if args.mixup == args.cutmix == 0 else 0.0)
    elif args.mixup > 0 or args.cutmix > 0:
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    verbose = utils.is_primary(args)
    if args.kd_model_name is not None:
        teacher = {"teacher_model": args.kd_model_name, "criterion": criterion}
        return LogitDistillationTask(student_model=model, device=device, verbose=verbose, **teacher)
    return ClassificationTask(model=model, criterion=criterion, device=device, verbose=verbose)


def prepare(args, task, optimizer, device):
    """Resume, moving average, compilation, data parallelism; returns the epoch to start with."""
    start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer) if args.resume else 0
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed(device_ids=[device])
    return start_epoch


def train_one_epoch(
    epoch,
    model,
    loader,
    optimizer,
    args,
    task=None,
    device=torch.device("cuda"),  # noqa: B008
    lr_scheduler=None,
    saver=None,
    output_dir=None,
    amp_autocast=contextlib.suppress,
    mixup_fn=None,
    num_updates_total=None,
):
    losses = utils.AverageMeter()
    model.train()
    batches, left_over = len(loader), len(loader) % args.grad_accum_steps
    updates = epoch * (-(-batches // args.grad_accum_steps))
    optimizer.zero_grad()
    for index, (images, labels) in enumerate(loader):
        accumulated = left_over if index >= batches - left_over else args.grad_accum_steps
        need_update = index + 1 == batches or (index + 1) % args.grad_accum_steps == 0
        if not args.prefetcher:
            images, labels = images.to(device), labels.to(device)
        if mixup_fn is not None:
            images, labels = mixup_fn(images, labels)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with contextlib.nullcontext() if need_update else task.no_sync():
            with amp_autocast():
                loss = task(images, labels)["loss"]
            if accumulated > 1:
                loss /= accumulated  # in place, as timm's script does
            loss.backward()
        losses.update(loss.item() * accumulated, images.shape[0])
        if not need_update:
            continue
        optimizer.step()
        updates += 1
        optimizer.zero_grad()
        task.update_ema(step=updates)
        if updates % args.log_interval == 0 and utils.is_primary(args):
            _logger.info("update %d of %s: loss %.4f", updates, num_updates_total, losses.avg)
        if saver is not None and args.recovery_interval and updates % args.recovery_interval == 0:
            saver.save_recovery(epoch, batch_idx=index)
        lr_scheduler.step_update(num_updates=updates, metric=losses.avg)
    return OrderedDict(loss=_mean(losses.avg, args, device))


@torch.inference_mode()
def validate(model, loader, loss_fn, args, device, amp_autocast=contextlib.suppress):
    losses, top1 = utils.AverageMeter(), utils.AverageMeter()
    model.eval()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with amp_autocast():
            logits = model(images)
            loss = loss_fn(logits, labels)
        losses.update(loss.item(), images.shape[0])
        top1.update(utils.accuracy(logits, labels)[0].item(), images.shape[0])
    return OrderedDict(loss=_mean(losses.avg, args, device), top1=_mean(top1.avg, args, device))


def _mean(value, args, device):
    """`value`, averaged over the workers."""
    if not args.distributed:
        return value
    return utils.reduce_tensor(torch.tensor(value, device=device), args.world_size).item()


if __name__ == "__main__":
    main()
