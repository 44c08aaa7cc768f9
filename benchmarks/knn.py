# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the k-NN evaluation on features that are there already.

    python benchmarks/knn.py --against OFFICIAL_CHECKOUT
    python benchmarks/knn.py --train 1281167 --test 50000 --dim 384    # ImageNet; default on a GPU

Prints one JSON line: seconds for all --ks together, of which `search` finds the neighbours. `plain`
is the search wholly in float32 for some of the queries: its time beside ours, how many neighbours
only one of the two finds, and how many queries the first look in half precision did not settle. The
official code runs before ours, in a process of its own, on the same features.
"""

import argparse
from unittest.mock import patch

import torch
from common import (
    describe_machine,
    medians,
    peak_memory_gib,
    print_result,
    run_official_or_say_why,
    with_ratios,
)
from features import two_sets

from dino.distributed import choose_device
from dino.errors import exit_on_user_error
from dino.evaluation import knn, neighbours
from dino.evaluation.neighbours import nearest

COMPARED = 1000  # queries that are looked up wholly in float32 too


def main(argv=None):
    args = parse_args(argv)
    with exit_on_user_error("knn.py"):
        result = benchmark(args)
    print_result(result)


def benchmark(args):
    """What the JSON line says."""
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    train, test = (
        args.train or (1281167 if cuda else 100000),
        args.test or (50000 if cuda else 1000),
    )
    result = {
        "benchmark": "knn",
        **describe_machine(device),
        "train": train,
        "test": test,
        **{name: getattr(args, name) for name in ("dim", "classes", "ks")},
    }
    if args.against:
        result["official"] = time_official(args, train, test, device)
    features = two_sets(train, test, args.dim, args.classes, device)
    result |= measure(*features, args.ks, args.classes, device, args.repeats)
    return with_ratios(result)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--train", type=int, help="training images; ImageNet's number, or 100,000 on a CPU")
    add("--test", type=int, help="test images; ImageNet's number, or 1,000 on a CPU")
    add("--dim", type=int, default=384, help="width of the features")
    add("--classes", type=int, default=1000)
    add("--ks", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--repeats", type=int, default=3, help="of which the median counts")
    add("--against", metavar="OFFICIAL_CHECKOUT", help="time the official k-NN as well")
    return parser.parse_args(argv)


def measure(train, train_labels, test, test_labels, ks, classes, device, repeats):
    """Seconds, memory and accuracies, for the JSON line."""
    top1, found = {}, []

    def recorded(*args):
        found[:] = nearest(*args)
        return found

    def whole(most=None):
        sets = (train, train_labels, test[:most], test_labels[:most])
        accuracies = knn.knn_accuracies(*sets, ks, 0.07, classes)
        top1.update({k: both[0] for k, both in accuracies.items()})

    whole(COMPARED)  # to warm up
    with patch.object(knn, "nearest", recorded):
        seconds, cpu_seconds = medians(whole, device, repeats, warmup=0)
    peak = peak_memory_gib(device)
    with patch.object(knn, "nearest", lambda *_: found):
        votes, _ = medians(whole, device, repeats)
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "seconds_by_part": {"search": round(seconds - votes, 3), "votes": round(votes, 3)},
        "peak_memory_gib": peak,
        "first_look": str(neighbours.fast_dtype(device)).removeprefix("torch."),
        "plain": compare_with_plain(train, test[:COMPARED], max(ks), device, repeats),
        "top1": top1,
    }


def compare_with_plain(train, test, k, device, repeats):
    """The search by way of half precision beside that in float32 wholly: seconds, and neighbours
    that only one of them has.
    """
    looked_up = []

    def search(queries, keys, k, dtype, function=neighbours.search):
        looked_up.append(len(queries) if dtype == torch.float32 else 0)
        return function(queries, keys, k, dtype)

    with patch.object(neighbours, "search", search):
        products, indices = nearest(test, train, k)
    plain_products, plain_indices = nearest(test, train, k, torch.float32)
    same = indices[:, :, None] == plain_indices[:, None]
    ours, _ = medians(lambda: nearest(test, train, k), device, repeats, warmup=0)
    plain, _ = medians(lambda: nearest(test, train, k, torch.float32), device, repeats, warmup=0)
    return {
        "queries": len(test),
        "looked_up_in_float32": sum(looked_up),
        "other_neighbours": int((~same.any(dim=2)).sum()),
        "largest_difference": float((products - plain_products).abs().max()),
        "search_s": round(ours, 3),
        "plain_search_s": round(plain, 3),
    }


def time_official(args, train, test, device):
    """What official.py says of the same features."""
    options = ["--train", train, "--test", test, "--dim", args.dim, "--classes", args.classes]
    options += ["--device", device.type, "--repeats", args.repeats, "--ks", *args.ks]
    return run_official_or_say_why(args.against, "knn", *options)


if __name__ == "__main__":
    main()
