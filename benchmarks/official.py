# SPDX-License-Identifier: Apache-2.0
"""Times a checkout of the official code; called by the benchmarks' --against.

    python benchmarks/official.py CHECKOUT augment FOLDER --images 80
    python benchmarks/official.py CHECKOUT step --batch 64
    python benchmarks/official.py CHECKOUT loop FOLDER --batch 64 --num_workers 16

Its modules are imported as they are. Only the question to the network that its parser asks is left
out. Prints one JSON line.
"""

import argparse
import itertools
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

GLOBAL_SIZE, LOCAL_SIZE, GLOBAL_SCALE, LOCAL_SCALE = 224, 96, (0.4, 1.0), (0.05, 0.4)


def augment(args):
    """Images/s of decoding and augmenting on one core, as a loader's worker does it."""
    import main_dino

    torch.set_num_threads(1)
    augmentation = main_dino.DataAugmentationDINO(GLOBAL_SCALE, LOCAL_SCALE, 8)
    paths = list_files(args.folder)[: args.images]

    def work(path):
        with open(path, "rb") as file:
            augmentation(Image.open(file).convert("RGB"))

    work(paths[0])
    rates = []
    for _ in range(args.passes):
        start = time.perf_counter()
        for path in paths:
            work(path)
        rates.append(len(paths) / (time.perf_counter() - start))
    return {"images_per_s_per_core": round(statistics.median(rates), 1)}


def knn(args):
    """Seconds for all --ks, one after the other as in the official script, and top-1 of each."""
    from features import two_sets

    import eval_knn

    features = two_sets(args.train, args.test, args.dim, args.classes, args.device)

    def accuracies():
        return [eval_knn.knn_classifier(*features, k, 0.07, args.classes)[0] for k in args.ks]

    top1 = accuracies()  # on the host, so that no wait for the device is needed
    times = timed(lambda _: accuracies(), range(args.repeats), warmup=0)
    seconds, cpu = (statistics.median(kind) for kind in zip(*times, strict=True))
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "peak_memory_gib": peak_memory_gib(args.device),
        "top1": dict(zip(args.ks, top1, strict=True)),
    }


def list_files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


class Training:
    """Student, teacher, loss, optimizer and scaler, put together as the official script does.

    float16 autocast on CUDA, which is the official default; float32 on a CPU, where the official
    code does not run by itself.
    """

    def __init__(self, args):
        import main_dino
        import utils
        import vision_transformer

        self.utils, self.device = utils, torch.device(args.device)
        self.autocast = self.device.type == "cuda" and not args.fp32
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

        def network(drop_path_rate):
            backbone = getattr(vision_transformer, args.arch)(
                patch_size=args.patch_size, drop_path_rate=drop_path_rate
            )
            head = vision_transformer.DINOHead(backbone.embed_dim, args.out_dim)
            return utils.MultiCropWrapper(backbone, head).to(self.device)

        self.student, self.teacher = network(0.1), network(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.student = DistributedDataParallel(self.student)
        self.loss = main_dino.DINOLoss(args.out_dim, args.local + 2, 0.04, 0.04, 0, 100)
        self.loss = self.loss.to(self.device)
        self.optimizer = torch.optim.AdamW(utils.get_params_groups(self.student), lr=1e-4)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.autocast)

    def step(self, images):
        """The official step, its waits for the device included."""
        images = [image.to(self.device, non_blocking=True) for image in images]
        with torch.autocast(self.device.type, torch.float16, enabled=self.autocast):
            teacher_output = self.teacher(images[:2])
            loss = self.loss(self.student(images), teacher_output, 1)
        loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.utils.clip_gradients(self.student, 3.0)
        self.utils.cancel_gradients_last_layer(1, self.student, 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for mine, theirs in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                mine.data.mul_(0.996).add_(0.004 * theirs.detach().data)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def describe(self, batch, times):
        """The JSON line, from the (seconds, seconds of processors) of the steps that count."""
        median, cpu = (statistics.median(kind) for kind in zip(*times, strict=True))
        return {
            "precision": "float16" if self.autocast else "float32",
            "ms_per_step": round(1000 * median, 2),
            "images_per_s": round(batch / median, 2),
            "cpu_ms_per_step": round(1000 * cpu, 2),
            "peak_memory_gib": peak_memory_gib(self.device),
        }


def peak_memory_gib(device):
    """Of the GPU's allocator, or of this process."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def timed(work, items, warmup):
    """From the end of one `work(item)` to that of the next, without the first ones: (seconds,
    seconds of processors) of each.
    """
    ends = [(time.perf_counter(), time.process_time())]
    for item in items:
        work(item)
        ends.append((time.perf_counter(), time.process_time()))
    spans = [(end[0] - begin[0], end[1] - begin[1]) for begin, end in itertools.pairwise(ends)]
    return spans[warmup:]


def step(args):
    """Steps on random images that are on the device already."""
    training = Training(args)
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * args.local
    images = [torch.randn(args.batch, 3, size, size, device=args.device) for size in sizes]
    times = timed(training.step, [images] * (args.steps + args.warmup), args.warmup)
    return training.describe(args.batch, times)


def loop(args):
    """Steps on files: the official loader's settings, augmentation and step."""
    import main_dino

    training = Training(args)
    augmentation = main_dino.DataAugmentationDINO(GLOBAL_SCALE, LOCAL_SCALE, args.local)
    count = args.batch * (args.steps + args.warmup)
    loader = DataLoader(
        Files(list_files(args.folder), augmentation, count),
        batch_size=args.batch,
        num_workers=args.num_workers,
        pin_memory=args.device == "cuda",
    )
    return training.describe(args.batch, timed(training.step, loader, args.warmup))


class Files(Dataset):
    """`count` augmented images, from a list that begins again at its end."""

    def __init__(self, paths, augmentation, count):
        self.paths, self.augmentation, self.count = paths, augmentation, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        with open(self.paths[index % len(self.paths)], "rb") as file:
            return self.augmentation(Image.open(file).convert("RGB"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout")
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("augment")
    job.add_argument("folder")
    job.add_argument("--images", type=int, default=120)
    job.add_argument("--passes", type=int, default=3)
    job.set_defaults(run=augment)
    job = jobs.add_parser("knn")
    job.set_defaults(run=knn)
    for name in ("train", "test", "dim", "classes", "repeats"):
        job.add_argument(f"--{name}", type=int, required=True)
    job.add_argument("--ks", type=int, nargs="+", required=True)
    job.add_argument("--device", required=True)
    for run in (step, loop):
        job = jobs.add_parser(run.__name__)
        job.set_defaults(run=run)
        job.add_argument("--arch", default="vit_small")
        job.add_argument("--patch_size", type=int, default=16)
        job.add_argument("--out_dim", type=int, default=65536)
        job.add_argument("--batch", type=int, default=64)
        job.add_argument("--local", type=int, default=8)
        job.add_argument("--steps", type=int, default=30)
        job.add_argument("--warmup", type=int, default=5)
        job.add_argument("--fp32", action="store_true")
        job.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if run is loop:
            job.add_argument("folder")
            job.add_argument("--num_workers", type=int, default=10)
    args = parser.parse_args()
    sys.path.insert(0, args.checkout)
    torch.hub.list = lambda *_, **__: []  # of XCiTs
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    main()
