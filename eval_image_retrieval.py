# SPDX-License-Identifier: Apache-2.0
"""Image retrieval on revisited Oxford and Paris with a frozen backbone (Sec. 4.2, Table 3).

    python eval_image_retrieval.py --data_path data/ --dataset roxford5k
    python eval_image_retrieval.py --data_path data/ --dataset rparis6k --imsize 512 --multiscale 1

--data_path holds a folder for each set: NAME/gnd_NAME.pkl and NAME/jpg/. Without
--pretrained_weights both commands download the ViT-S/16 that the authors trained on Google
Landmarks v2, for which they report mAP 51.5 (medium) and 24.3 (hard) on Oxford, 75.3 and 51.6 on
Paris. As in the official code, a query is the whole image, although the benchmark crops it to a
box. Features are not whitened, and results are not re-ranked.
"""

from pathlib import Path

import numpy as np

from dino.backbones import canonical_name
from dino.command_line import (
    Parser,
    add_image_arguments,
    add_launch_arguments,
    add_precision_argument,
    add_use_cuda_argument,
    add_weights_arguments,
    bool_flag,
    device_flag,
    loader_workers,
    number,
    tell_idle,
)
from dino.data.images import limit_pixels
from dino.data.retrieval_set import open_retrieval_set
from dino.distributed import init_distributed, is_main_process, print0, shut_down
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.retrieval import rank, score, set_features
from dino.evaluation.retrieval_pictures import draw_query
from dino.json_files import write_json
from dino.output_checks import check_output_file, check_output_folder
from dino.precision import choose_amp_dtype
from dino.printable import printable
from dino.same_on_ranks import check_same_flags
from dino.spread import spread
from dino.training import plots
from dino.weights.pretrained import open_backbone
from dino.weights.published import (
    PUBLISHED_BACKBONES,
    PUBLISHED_ON_LANDMARKS,
    PUBLISHED_URL,
    published_entry,
)

DESCRIPTION = (
    "Retrieval by frozen features. Without --pretrained_weights the weights are those of the"
    " ViT-S/16 that the authors trained on Google Landmarks v2."
)
KS = [1, 5, 10]  # of the precision at k


def get_args_parser():
    parser = Parser(prog="eval_image_retrieval.py", description=DESCRIPTION)
    add_weights_arguments(parser.add_argument_group("backbone"))
    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add(
        "--data_path",
        default="/path/to/revisited_paris_oxford/",
        help="a folder with NAME/gnd_NAME.pkl and NAME/jpg/ for each set",
    )
    add(
        "--dataset",
        default="roxford5k",
        help="NAME of the set: roxford5k, rparis6k or one of your own",
    )
    add(
        "--multiscale",
        default=False,
        type=bool_flag,
        help="average the features of three scales; the authors do so on Paris, not on Oxford",
    )
    add(
        "--imsize",
        default=224,
        type=number(int, 1, 2**13),
        help="pixels of the longer side; smaller images are not enlarged. The authors take 512 on"
        " Paris and 224 on Oxford",
    )
    add(
        "--batch_size_per_gpu",
        default=16,
        type=number(int, 1),
        help="most images per forward pass; only images of equal size share one",
    )
    add_use_cuda_argument(evaluation)
    add_precision_argument(evaluation, default="float32")
    add = parser.add_argument_group("output").add_argument
    add("--output", default=None, help="JSON file for the scores, with those of every query")
    add(
        "--save_pictures",
        default=0,
        type=number(int, 0),
        metavar="N",
        help="draw N queries, spread over the set, each with its first ten results",
    )
    add("--output_dir", default=".", help="folder of the pictures")
    add_image_arguments(parser)
    add_launch_arguments(parser.add_argument_group("launch"))
    return parser


def eval_image_retrieval(args):
    """Print and return {difficulty: (mAP, AP of each query, mean P@k, P@k of each query)}."""
    check_flags(args)
    limit_pixels(args.max_image_pixels)
    _, device = init_distributed(device_flag(args), args.dist_url)
    check_same_flags(args)
    images = open_retrieval_set(args.data_path, args.dataset)
    print0(f"train: {len(images.database)} imgs / query: {len(images.queries)} imgs")
    files = picture_files(args, images)
    for path in files.values():
        check_output_file(path, f"--output_dir {args.output_dir}:", ending=".png")
    pretrained = open_backbone(args, published=PUBLISHED_ON_LANDMARKS)
    pretrained.require_rgb(f"--pretrained_weights {args.pretrained_weights}")
    database, queries = set_features(
        pretrained,
        images,
        args.imsize,
        args.multiscale,
        device=device,
        batch_size=args.batch_size_per_gpu,
        num_workers=loader_workers(args.num_workers),
        amp_dtype=choose_amp_dtype(args.amp_dtype, device),
    )
    ranks = rank(database, queries)
    scores = score(ranks, images.ground_truth, KS)
    print_scores(printable(images.name), scores)
    if args.output and is_main_process():
        write_scores(args, pretrained, images, scores)
    if is_main_process():
        save_pictures(files, images, ranks)
    shut_down()
    return scores


def check_flags(args):
    """Raise UserError for invalid flags, before anything is opened."""
    if args.output:
        check_output_file(args.output, ending=".json")
    if args.save_pictures:
        check_output_folder(args.output_dir)
    else:
        tell_idle(args, ("output_dir",), "--save_pictures 0")
    arch, patch_size = canonical_name(args.arch), args.patch_size
    if not args.pretrained_weights and not published_entry(
        PUBLISHED_ON_LANDMARKS, arch, patch_size
    ):
        file = published_entry(PUBLISHED_BACKBONES, arch, patch_size)
        url = f" The one trained on ImageNet is {PUBLISHED_URL}{file}/{file}.pth." if file else ""
        raise UserError(
            f"--arch {args.arch} --patch_size {patch_size}: for retrieval the authors published a"
            " ViT-S/16 only, trained on Google Landmarks v2. Give a file with --pretrained_weights."
            f"{url}"
        )


def print_scores(name, scores):
    """The two lines of the official script, for medium and hard, and two of ours for easy."""
    easy, medium, hard = (
        (np.around(100 * mean, 2), np.around(100 * precisions, 2))
        for mean, _, precisions, _ in scores.values()
    )
    ks = np.array(KS)
    print0(f">> {name}: mAP M: {medium[0]}, H: {hard[0]}")
    print0(f">> {name}: mP@k{ks} M: {medium[1]}, H: {hard[1]}")
    print0(f">> {name}: mAP E: {easy[0]}")
    print0(f">> {name}: mP@k{ks} E: {easy[1]}")


def write_scores(args, pretrained, images, scores):
    """Write the protocol, the means, and the average precision of every query, from 0 to 1."""
    content = dict(
        dataset=images.name,
        arch=pretrained.arch,
        patch_size=pretrained.patch_size,
        imsize=args.imsize,
        multiscale=args.multiscale,
    )
    for difficulty, (mean, _, precisions, _) in scores.items():
        at_k = dict(zip(KS, precisions.tolist(), strict=True))
        content[difficulty] = {"mAP": float(mean), "mP@k": at_k}
    content["AP"] = [
        {"query": Path(path).stem, **{name: float(aps[i]) for name, (_, aps, *_) in scores.items()}}
        for i, path in enumerate(images.queries)
    ]
    write_json(args.output, content)


def picture_files(args, images):
    """{number of a query, as in the ground truth: path of its picture} of --save_pictures."""
    queries = spread(len(images.queries), args.save_pictures)
    return {query: Path(args.output_dir) / f"query{query:03}.png" for query in queries}


def save_pictures(files, images, ranks):
    """Write the pictures, {query: path}."""
    for query, path in files.items():
        plots.save(draw_query(images, query, ranks[:, query]), path)
        print0(path)


def main():
    with exit_on_user_error("eval_image_retrieval.py"):
        eval_image_retrieval(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
