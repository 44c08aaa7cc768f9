# SPDX-License-Identifier: Apache-2.0
"""Images/s of the loader: a worker's part on one core, and the device's on whole batches.

    python benchmarks/loader.py FOLDER [--against OFFICIAL_CHECKOUT]

One JSON line. `device`: decode, crop and flip as `--augment device` has it, the colours being the
device's part, which is timed apart; `cpu`: all of it in Pillow. The official augmentation is timed
on the same images, also on one core.
"""

import argparse
import statistics
import time

import torch
from common import describe_machine, print_result, run_official, synchronize
from torch.utils.data._utils.pin_memory import pin_memory

from dino.data.augmentations import DataAugmentationDINO
from dino.data.augmentations_on_device import CropStage, DeviceStage
from dino.data.images import list_training_images, read_image
from dino.data.items import collate_readable

AUGMENTATION = DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)  # the official defaults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=120, help="the first ones of the folder")
    parser.add_argument(
        "--batch", type=int, default=64, help="images that the device takes at once"
    )
    parser.add_argument("--passes", type=int, default=5, help="of which the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against", metavar="OFFICIAL_CHECKOUT")
    args = parser.parse_args()
    device, paths = torch.device(args.device), list_training_images(args.folder)[: args.images]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's worker
    rates = {
        "device": worker_rate(CropStage(AUGMENTATION), paths, args.passes),
        "cpu": worker_rate(AUGMENTATION, paths, args.passes),
    }
    parts = worker_parts(paths, args.passes)
    torch.set_num_threads(threads)
    result = {
        "benchmark": "loader",
        **describe_machine(device),
        "images": len(paths),
        "images_per_s_per_core": rates,
        "worker_ms_per_image": parts,
        "device_stage": device_stage(paths, args.batch, args.passes, device),
    }
    if args.against:
        official = run_official(args.against, "augment", args.folder, "--images", args.images)
        result["official_images_per_s_per_core"] = reference = official["images_per_s_per_core"]
        result["ratio"] = {name: round(value / reference, 2) for name, value in rates.items()}
    print_result(result)


def rate(work, items, passes):
    """Items per second of `work(item)`: median of `passes` passes after one call to warm up."""
    work(items[0])
    rates = []
    for _ in range(passes):
        start = time.perf_counter()
        for item in items:
            work(item)
        rates.append(len(items) / (time.perf_counter() - start))
    return round(statistics.median(rates), 1)


def worker_rate(augmentation, paths, passes):
    """Images/s of what a loader's worker does to a file, on one core."""
    return rate(lambda path: augmentation(read_image(path), key=0), paths, passes)


def worker_parts(paths, passes):
    """Milliseconds per image: decoding, the drawing of parameters, and the crops."""
    images = [read_image(path) for path in paths]
    rates = {
        "decode": rate(read_image, paths, passes),
        "draw": rate(lambda image: AUGMENTATION.draw(image, key=0), images, passes),
        "draw_and_crop": rate(lambda image: CropStage(AUGMENTATION)(image, key=0), images, passes),
    }
    return {name: round(1000 / value, 3) for name, value in rates.items()}


def device_stage(paths, batch, passes, device):
    """Images/s and milliseconds per batch of the colours, copies to the device included."""
    crops = CropStage(AUGMENTATION)
    items = [crops(read_image(path), key=n) for n, path in enumerate(paths)]
    cropped = collate_readable([items[n % len(items)] for n in range(batch)])
    if device.type == "cuda":
        cropped = pin_memory(cropped)
    stage = DeviceStage(AUGMENTATION, device)

    def whole_batch(_):
        stage(cropped)
        synchronize(device)

    per_s = rate(whole_batch, range(3), passes)
    return {"batch": batch, "ms": round(1000 / per_s, 2), "images_per_s": round(batch * per_s, 1)}


if __name__ == "__main__":
    main()
