# SPDX-License-Identifier: Apache-2.0
"""Sets in the layout of revisited Oxford and Paris (Radenovic et al. 2018).

    DATA_PATH/NAME/gnd_NAME.pkl     ground truth
    DATA_PATH/NAME/jpg/IMAGE.jpg    images of the database, and queries

The ground truth lists both, and for each query which images of the database show what it shows. It
is a pickle, read without running code in it.
"""

from dataclasses import dataclass

from PIL import Image, ImageFile
from torchvision.transforms import functional as F

from dino.data.augmentations import IMAGENET_MEAN, IMAGENET_STD
from dino.data.images import UnreadableImage, given_path, image_size, images_by_name, read_image
from dino.data.plain_pickle import read_plain_pickle
from dino.errors import UserError
from dino.printable import printable

LABELS = ("easy", "hard", "junk")  # of database images, for each query


@dataclass
class RetrievalSet:
    """Paths of the images, and for each query which of the database are easy, hard and junk."""

    name: str
    database: list
    queries: list
    sizes: list  # (width, height) of the database's images, then of the queries
    ground_truth: list  # {"easy": [...], "hard": [...], "junk": [...]}; junk may be absent

    @property
    def paths(self):
        return self.database + self.queries


def open_retrieval_set(data_path, name):
    """The RetrievalSet `name` in `data_path`. UserError unless all that it names is there."""
    folder = given_path(data_path) / name
    file = folder / f"gnd_{name}.pkl"
    if not file.is_file():
        raise UserError(
            f"--data_path {data_path} --dataset {name}: no file {file}. --data_path must hold"
            f" {name}/gnd_{name}.pkl and {name}/jpg/, as the benchmark's own download makes them."
        )
    content = read_ground_truth(file)
    images = folder / "jpg"
    if not images.is_dir():
        raise UserError(f"--data_path {data_path} --dataset {name}: no folder {images}.")
    paths = images_by_name(images)
    names = content["imlist"] + content["qimlist"]
    missing = [name for name in names if name not in paths]
    if missing:
        raise UserError(
            f"{images}: {len(missing)} of the {len(names)} images that {file.name} names are not"
            f" there; the first is {printable(missing[0])}.jpg."
        )
    database, queries = ([paths[image] for image in content[key]] for key in ("imlist", "qimlist"))
    sizes = [image_size(path) for path in database + queries]
    return RetrievalSet(name, database, queries, sizes, content["gnd"])


def read_ground_truth(path):
    """{"gnd", "imlist", "qimlist", ...} of a file of the benchmark, read without running code.

    `imlist` and `qimlist` are names of images without folder and suffix; `gnd` holds for each
    query a dict whose lists `easy`, `hard` and `junk` are indices into `imlist`. `bbx`, the part of
    the query that shows the building, is not used: the query is the whole image, as in the official
    code. Raises UserError for a file that holds code, or is not such a ground truth.
    """
    content = read_plain_pickle(path)
    problem = problem_with(content)
    if problem:
        raise UserError(f"{path}: not a ground truth of this benchmark: {printable(problem)}.")
    return content


def problem_with(content):
    """What keeps `content` from being a ground truth, or None."""
    if not isinstance(content, dict) or not {"gnd", "imlist", "qimlist"} <= content.keys():
        return "it is not a dict with gnd, imlist and qimlist"
    for key in ("imlist", "qimlist"):
        names = content[key]
        if not isinstance(names, list) or not names or not all(type(n) is str for n in names):
            return f"{key} is not a list of names"
    places = {name: i for i, name in enumerate(content["imlist"])}
    if len(places) < len(content["imlist"]):
        twice = next(name for i, name in enumerate(content["imlist"]) if places[name] != i)
        return f"imlist has {twice!s:.60} twice, and its copy would count as a wrong result"
    gnd, queries = content["gnd"], len(content["qimlist"])
    if not isinstance(gnd, list) or len(gnd) != queries:
        return f"gnd is not a list of {queries} entries, one for each name in qimlist"
    for number, entry in enumerate(gnd):
        problem = problem_with_entry(entry, len(content["imlist"]))
        if problem:
            return f"entry {number} of gnd {problem}"
        own = places.get(content["qimlist"][number])
        if own is not None and not any(own in entry.get(label, []) for label in LABELS):
            return (
                f"entry {number} of gnd does not name its query, which is image {own} of imlist and"
                " would count as a wrong result; put it into junk"
            )
    if not any(entry["easy"] or entry["hard"] for entry in gnd):
        return "no query has an easy or a hard image"
    return None


def problem_with_entry(entry, database_size):
    """What keeps the `entry` of a query from being one, or None."""
    if not isinstance(entry, dict) or not {"easy", "hard"} <= entry.keys():
        return "is not a dict with easy and hard"
    seen = set()
    for label in LABELS:
        indices = entry.get(label, [])
        if not isinstance(indices, list) or not all(type(i) is int for i in indices):
            return f"has {label} images that are not a list of whole numbers"
        for index in indices:
            if not 0 <= index < database_size:
                return f"has the {label} image {index!s:.20}; imlist has {database_size}"
            if index in seen:
                return f"names image {index} twice"
            seen.add(index)
    return None


def load_image(path, imsize, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """The image, normalised: (3, H, W), of which the longer side is at most `imsize` pixels.

    It keeps its aspect ratio and is never enlarged. Pillow's thumbnail, with its default reducing
    gap, is part of the protocol: it averages pixels in blocks before it filters with Lanczos.
    """
    image = read_even_truncated(path)
    image.thumbnail((imsize, imsize), Image.Resampling.LANCZOS)
    return F.normalize(F.to_tensor(image), mean, std)


def read_even_truncated(path):
    """`read_image`, but a truncated file is read as far as it goes, with a warning.

    The official code reads such files too, without a warning.
    """
    try:
        return read_image(path)
    except UnreadableImage:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            image = read_image(path)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
        print(f"Warning: {printable(path)} is truncated; the rest of it is grey.", flush=True)
        return image
