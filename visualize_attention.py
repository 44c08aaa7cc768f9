# SPDX-License-Identifier: Apache-2.0
"""Attention maps: where [CLS] looks in the last block of a frozen ViT (Fig. 1 and 3).

    python visualize_attention.py --pretrained_weights runs/photos/backbone.pth --image_path a.jpg
    python visualize_attention.py --image_path photos/ --threshold 0.6     # published weights

For each image: img.png, attn-head0.png, ... and, with --threshold, mask_th0.6_head0.png, ... (the
official names); beside them attn-mean.png, overlay.png, and everything on one sheet, attention.png.
A folder of images gets a folder of pictures for each. As in the official code, images are resized
to 480 x 480 pixels; --image_size 480 keeps their aspect ratio. Unlike there, a photograph is turned
as its EXIF data ask, and img.png shows it as it is, not stretched to the full range of colours; of
other channels than RGB it shows the first three. The published weights of vit_small with patches of
8 are the 300-epoch model of the paper's pictures. No GPU is needed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from dino.command_line import (
    Parser,
    add_device_argument,
    add_image_arguments,
    add_weights_arguments,
    number,
)
from dino.data.channels import RGB, as_picture, read_any, to_levels_tensor
from dino.data.demo import open_photograph
from dino.data.images import UnreadableImage, find_images_or_arrays, limit_pixels
from dino.distributed import print0
from dino.errors import UserError, exit_on_user_error
from dino.evaluation.attention import (
    class_attention,
    fit_to_patches,
    keep_mass,
    open_for_attention,
    upsample,
)
from dino.figures import plt
from dino.output_checks import check_output_file, check_output_folder
from dino.printable import printable
from dino.training import plots
from dino.weights.published import PUBLISHED_FOR_PICTURES

PHOTOGRAPH = "chelsea.png"  # a cat, which scikit-image brings along
MASK_COLOR = (255, 0, 160)  # rare in photographs
SHEET = "attention.png"  # all pictures of an image
SHEET_COLUMNS = 6
TALLEST = 4  # panel of the sheet, in its widths: a strip is drawn smaller, not a sheet of metres
FAR_LARGER = 3  # the published backbones, trained on 224 pixels, are shown at 480 by default


def get_args_parser():
    parser = Parser(prog="visualize_attention.py", description="Attention maps of the class token.")
    add_weights_arguments(parser.add_argument_group("backbone"), patch_size=8)
    add = parser.add_argument_group("pictures").add_argument
    add(
        "--image_path",
        default=None,
        help="a photograph, or a folder of them; without it, one that comes with scikit-image",
    )
    add(
        "--image_size",
        default=[480, 480],
        nargs="+",
        type=number(int, 0, 2**13),
        metavar="PIXELS",
        help="height and width to resize to, whatever the aspect ratio; or the short side alone,"
        " which keeps it; or 0, for images as they are",
    )
    add(
        "--threshold",
        default=None,
        type=number(float, high=1, above=0),
        help="draw masks too, of the patches that hold this share of the attention; the paper's"
        " have 0.6",
    )
    add("--output_dir", default=".", help="folder of the pictures")
    add_image_arguments(parser)
    add_device_argument(parser)
    return parser


def visualize_attention(args):
    """Write the pictures of every image."""
    limit_pixels(args.max_image_pixels)
    check_picture_size(args.image_size)
    check_output_folder(args.output_dir)
    photographs = list_photographs(args.image_path, args.output_dir)
    for _, folder in photographs:
        check_own_pictures(folder)
    pretrained = open_for_attention(args, PUBLISHED_FOR_PICTURES, rgb_only=False)
    network = f"{pretrained.arch}, patches of {pretrained.patch_size} pixels"
    tell_own_size(args.image_size, pretrained.image_size)
    for path, folder in photographs:
        name = path or PHOTOGRAPH
        image = open_upright(path, pretrained.in_chans)
        image, _ = fit_to_patches(image, args.image_size, pretrained.patch_size, name)
        maps = class_attention(pretrained, image).cpu()
        if pretrained.in_chans != RGB:
            image = as_picture(image.permute(1, 2, 0).numpy())
        groups = draw_pictures(image, maps, pretrained.patch_size, args.threshold)
        title = f"{printable(Path(name).name)}: attention of [CLS], {network}"
        save_pictures(groups, folder, path, title)
        heads, rows, columns = maps.shape
        print0(printable(f"{name}: {rows} x {columns} patches, {heads} heads: {folder / SHEET}"))


def check_picture_size(image_size):
    if len(image_size) > 2 or (0 in image_size and len(image_size) == 2):
        raise UserError(
            f"--image_size {' '.join(map(str, image_size))}: give height and width, or the short"
            " side alone, or 0 for images as they are."
        )


def check_own_pictures(folder):
    """Raise UserError for a picture that would be replaced and is not of an earlier run.

    Such a run leaves a sheet of them all, which these scripts know as theirs.
    """
    sheet = folder / SHEET
    check_output_file(sheet, f"--output_dir {folder}:", ending=".png")
    if sheet.exists():
        return
    for name in ("img.png", "attn-mean.png", "overlay.png", "attn-head0.png"):
        if (folder / name).exists():
            raise UserError(
                f"--output_dir {folder}: {name} there would be overwritten, and is not of an"
                f" earlier run, which leaves {SHEET}. Give another folder, or move it away."
            )


def tell_own_size(image_size, trained):
    """Say so where images are drawn far larger than those of `trained` pixels of the training."""
    if min(image_size) > FAR_LARGER * trained:
        print0(
            f"Images are resized to {' x '.join(map(str, image_size))} pixels, and the backbone was"
            f" trained on {trained}: add --image_size {trained} to see maps as in training."
        )


def list_photographs(image_path, output_dir):
    """(path, folder of its pictures) of the image, or of each image of the folder, at any depth.

    The folders of pictures are called as the images, without suffixes unless two images would then
    share one. Without an `image_path`, the path is None.
    """
    output_dir = Path(output_dir)
    if image_path is None or Path(image_path).is_file():
        return [(image_path, output_dir)]
    if not Path(image_path).is_dir():
        raise UserError(
            f"--image_path {image_path}: no such file or folder. Leave the flag out for a"
            " photograph that comes with scikit-image."
        )
    paths = find_images_or_arrays(image_path)
    if not paths:
        raise UserError(f"--image_path {image_path}: no image in this folder or below it.")
    if output_dir.resolve().is_relative_to(Path(image_path).resolve()):
        raise UserError(
            f"--output_dir {output_dir} is in --image_path {image_path}: the pictures would be"
            " taken for photographs next time. Give another."
        )
    full_names = [Path(path).relative_to(image_path) for path in paths]
    names = [path.with_suffix("") for path in full_names]
    if len(set(names)) < len(names):
        names = full_names
    return [(path, output_dir / name) for path, name in zip(paths, names, strict=True)]


def open_upright(path, in_chans):
    """PIL image, turned as the camera was held if the file says so.

    Of other channels than RGB a tensor, uint8 (C, H, W), which is not turned.
    """
    if not path and in_chans != RGB:
        raise UserError(
            f"--image_path is missing: the backbone takes images of {in_chans} channels, and the"
            " photograph that comes with scikit-image has 3."
        )
    if not path:
        return open_photograph(PHOTOGRAPH)
    try:
        image = read_any(path, in_chans)
    except UnreadableImage as error:
        raise UserError(f"--image_path {error}") from None
    return ImageOps.exif_transpose(image) if in_chans == RGB else to_levels_tensor(image)


@dataclass
class Picture:
    file: str
    title: str
    pixels: np.ndarray  # (H, W, 3) uint8


def draw_pictures(image, maps, patch_size, threshold=None):
    """Groups (lists) of Pictures: of the image as a whole, of the heads, of the heads' masks.

    `image`: PIL, W x H; `maps`: (h, R, C); `threshold`: share of the attention in a mask, or None
    for no masks.
    """
    photograph, mean = np.asarray(image), maps.mean(dim=0)
    heat = color_map(upsample(mean, patch_size))
    grey = np.asarray(image.convert("L"))[..., None]  # so that every colour is one of the map
    groups = [
        [
            Picture("img.png", "image", photograph),
            Picture("attn-mean.png", "mean of heads", heat),
            Picture("overlay.png", "mean over the image", blend(grey, heat, 0.5)),
        ],
        [
            Picture(f"attn-head{j}.png", f"head {j}", color_map(upsample(head, patch_size)))
            for j, head in enumerate(maps)
        ],
    ]
    if threshold is not None:

        def draw(file, title, map_):
            mask = keep_mass(map_, threshold)
            area = 100 * mask.double().mean()
            title = f"{title}: {100 * threshold:g} % of mass, {area:.0f} % of area"
            return Picture(file, title, draw_mask(photograph, upsample(mask, patch_size).numpy()))

        prefix = f"mask_th{threshold}"
        groups[0].append(draw(f"{prefix}_mean.png", "mean", mean))
        groups.append(
            [draw(f"{prefix}_head{j}.png", f"head {j}", head) for j, head in enumerate(maps)]
        )
    return groups


def color_map(values):
    """matplotlib's default colours from the lowest value to the highest: (H, W) -> (H, W, 3)."""
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else values - low
    return plt.colormaps["viridis"](scaled.numpy(), bytes=True)[..., :3]


def blend(below, above, opacity):
    """`above` over `below`, which broadcast to (H, W, 3) uint8."""
    return np.rint((1 - opacity) * below + opacity * np.asarray(above)).astype(np.uint8)


def draw_mask(photograph, mask):
    """The photograph (H, W, 3) with the `mask` (H, W) tinted, and its contours drawn."""
    from skimage.measure import find_contours  # a second, for those who want masks

    tinted = np.where(mask[..., None], blend(photograph, MASK_COLOR, 0.5), photograph)
    picture = Image.fromarray(tinted)
    pen = ImageDraw.Draw(picture)
    # A frame of zeros, so that a contour closes where the mask goes on to the image's border.
    for contour in find_contours(np.pad(mask.astype(float), 1), 0.5):
        points = [(x - 1, y - 1) for y, x in contour]
        pen.line(points, fill=MASK_COLOR, width=1 + min(picture.size) // 240)
    return np.asarray(picture)


def save_pictures(groups, folder, source, title):
    """Write the pictures and a sheet of them, as PNG, to `folder`; UserError where one would
    replace `source`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {picture.file: picture.pixels for group in groups for picture in group}
    for name in [*files, SHEET]:
        if source and (folder / name).resolve() == Path(source).resolve():
            raise UserError(
                f"--image_path {source} would be overwritten by a picture of that name. Give"
                " another --output_dir."
            )
    draw_sheet(folder / SHEET, title, groups)  # first: check_own_pictures knows our folders by it
    for name, pixels in files.items():
        Image.fromarray(pixels).save(folder / name)


def draw_sheet(path, title, groups):
    """Contact sheet of all the pictures: each group begins a row."""
    columns = min(SHEET_COLUMNS, max(map(len, groups)))
    rows = [
        group[start : start + columns]
        for group in groups
        for start in range(0, len(group), columns)
    ]
    height, width, _ = groups[0][0].pixels.shape
    panel_width = 3.0  # inches
    panel_height = panel_width * min(height / width, TALLEST) + 0.35
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(panel_width * columns, panel_height * len(rows) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for row_axes, row in zip(axes, rows, strict=True):
        for axis in row_axes:
            axis.axis("off")
        for axis, picture in zip(row_axes, row, strict=False):
            axis.imshow(picture.pixels)
            axis.set_title(picture.title, fontsize=10)
    figure.suptitle(title, fontsize=12)
    plots.save(figure, path)


def main():
    with exit_on_user_error("visualize_attention.py"):
        visualize_attention(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
