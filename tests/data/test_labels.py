# SPDX-License-Identifier: Apache-2.0
"""Images of any folder, list or data set, with labels where they have any."""

import pytest
from conftest import photograph

from dino.data.images import list_training_images
from dino.data.labels import UNLABELLED, class_name, list_images
from dino.errors import UserError


@pytest.fixture
def photos(tmp_path):
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "10/4.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        photograph().crop((0, 0, 8, 8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def listed(path):
    found = list_images(path)
    return [p.split("photos/")[-1] for p in found.paths], found.labels.tolist(), found.classes


def test_a_class_is_the_first_folder_below_as_for_image_folder(photos):
    names = ["10/4.png", "a/1.png", "a/deep/2.png", "b/3.png"]
    assert listed(photos) == (names, [0, 1, 1, 2], ["10", "a", "b"])
    assert str(list_images(photos)) == "4 images of 3 classes"


def test_an_image_outside_of_class_folders_leaves_all_without_labels(photos):
    photograph().crop((0, 0, 8, 8)).save(photos / "5.png")
    _, labels, classes = listed(photos)
    assert (labels, classes) == ([UNLABELLED] * 5, [])
    assert str(list_images(photos)) == "5 images without labels"


def test_a_data_set_shares_its_classes_among_train_and_val(class_folders):
    found = list_images(class_folders)
    assert found.classes == ["astronaut", "chelsea", "coffee"]
    assert found.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("lines", "labels", "classes"),
    [
        ("a/1.png\nb/3.png\n", [-1, -1], []),
        ("a/1.png\t7\n\nb/3.png\t10\n", [7, 10], []),  # numbers stay
        ("a/1.png\tzebra\nb/3.png\tant\n", [1, 0], ["ant", "zebra"]),
        ("a/1.png\t7\nb/3.png\tant\n", [0, 1], ["7", "ant"]),
        ("a/1.png\t7\nb/3.png\n", [-1, -1], []),
    ],
)
def test_a_list_may_have_labels_after_tabs(photos, lines, labels, classes):
    (photos / "list.txt").write_text(lines)
    assert listed(photos / "list.txt") == (["a/1.png", "b/3.png"], labels, classes)


def test_a_list_with_labels_names_the_line_of_a_file_that_is_not_there(photos):
    (photos / "list.txt").write_text("a/1.png\t0\nc/1.png\t1\n")
    with pytest.raises(UserError, match=r"line 2 names .*photos/c/1\.png, which is not a file"):
        list_images(photos / "list.txt")


def test_training_reads_a_list_with_labels_and_a_name_with_a_tab(photos):
    named = photos / "a" / "with\ttab.png"
    (photos / "a" / "1.png").rename(named)
    (photos / "list.txt").write_text("b/3.png\tant\na/with\ttab.png\n")
    assert list_training_images(photos / "list.txt") == [str(photos / "b" / "3.png"), str(named)]


def test_a_table_with_commas_is_told_how_a_list_looks(photos):
    (photos / "labels.csv").write_text("a/1.png,0\n")
    with pytest.raises(UserError, match=r"one path per line, and after a tab perhaps a label"):
        list_training_images(photos / "labels.csv")


def test_names_of_classes():
    assert class_name(1, ["ant", "zebra"]) == "zebra"
    assert class_name(7, []) == "7"
    assert class_name(UNLABELLED, ["ant"]) == ""
