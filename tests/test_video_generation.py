# SPDX-License-Identifier: Apache-2.0
"""Attention maps of frames, and video_generation.py as a user runs it."""

import re
import shlex

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import photograph, run_script
from helpers import parse, save_random_backbone
from PIL import Image

import video_generation
from dino.backbones import build_backbone
from dino.data.own_pictures import save
from dino.data.videos import frames_per_second, read_frames, writing
from dino.errors import UserError
from dino.evaluation.attention import keep_mass

pytest.importorskip("av")
COUNT, HEIGHT, WIDTH = 5, 44, 68  # of the frames; 5 x 8 patches of 8 pixels


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return save_random_backbone(tmp_path_factory.mktemp("weights") / "backbone.pth", "vit_nano")


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """A window moves over a photograph, and the light goes out: 12 frames per second."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with writing(path, 12, WIDTH, HEIGHT) as append:
        for i in range(COUNT):
            window = photograph().crop((180 + 9 * i, 30, 180 + 9 * i + WIDTH, 30 + HEIGHT))
            append((np.asarray(window) * (1 - i / COUNT)).astype(np.uint8))
    return path


def generate(source, output, *flags):
    """What the command does, in this process; the pictures of its video."""
    args = parse(video_generation, "--input_path", source, "--output_path", output, *flags)
    video_generation.video_generation(args)
    return [np.asarray(frame) for frame in read_frames(output / f"video.{args.video_format}")]


def save_frames(folder, count=COUNT, suffix=".jpg", size=(WIDTH, HEIGHT)):
    folder.mkdir(parents=True)
    for i in range(count):
        image = photograph().crop((180 + 9 * i, 30, 280 + 9 * i, 130)).resize(size)
        image.save(folder / f"picture{i}{suffix}")
    return folder


def test_the_map_is_the_mean_of_the_heads_attention_in_squares():
    torch.manual_seed(0)
    model = build_backbone("vit_nano", 8, img_size=32)[0].eval()
    image = torch.randn(3, 45, 67)  # cut to 40 x 64
    with torch.no_grad():
        attention = model.get_last_selfattention(image[None, :, :40, :64])
    expected = attention[0, :, 0, 1:].mean(dim=0).view(5, 8).repeat_interleave(8, 0)
    found = video_generation.mean_attention(model, image)
    torch.testing.assert_close(found, expected.repeat_interleave(8, 1))


def test_a_video_becomes_frames_maps_and_a_video_as_a_user_runs_it(film, weights, tmp_path):
    result = run_script(
        *("video_generation.py", "--input_path", film, "--output_path", tmp_path / "out"),
        *("--pretrained_weights", weights, "--side_by_side", "--device", "cpu"),
    )
    assert result.returncode == 0, result.stderr
    assert "video.mp4: 128 x 40 pixels, 12 frames per second" in result.stdout
    output = tmp_path / "out"
    names = [f"frame-{i:04}.jpg" for i in range(COUNT)]
    assert sorted(path.name for path in (output / "frames").iterdir()) == names
    assert sorted(p.name for p in (output / "attention").iterdir()) == [f"attn-{n}" for n in names]
    assert sorted(path.name for path in output.iterdir()) == [
        *("attention", "attention.npy", "frames", "video.mp4")
    ]
    maps = np.load(output / "attention.npy")
    assert maps.shape == (COUNT, 5, 8)
    pictures = list(read_frames(output / "video.mp4"))
    assert len(pictures) == COUNT
    for name, picture in zip(names, pictures, strict=True):
        left = np.asarray(Image.open(output / "frames" / name).crop((0, 0, 64, 40))).astype(int)
        right = np.asarray(Image.open(output / "attention" / f"attn-{name}")).astype(int)
        found = np.asarray(picture).astype(int)
        assert abs(found[:, :64] - left).mean() < 8
        assert (
            abs(found[:, 64:] - right).mean() < 16
        )  # of sharp squares, coded with half the colour
    assert frames_per_second(output / "video.mp4") == 12


def test_one_colour_scale_serves_the_whole_video_unless_each_frame_is_to_have_its_own(
    weights, tmp_path
):
    frames = save_frames(tmp_path / "frames", suffix=".png")
    inferno = plt.colormaps["inferno"]

    def colors(flags):
        generate(frames, tmp_path / "out", "--pretrained_weights", weights, *flags)
        paths = [tmp_path / "out" / "attention" / f"attn-picture{i}.png" for i in range(COUNT)]
        return [np.asarray(Image.open(path))[4::8, 4::8] for path in paths]

    together, alone = colors([]), colors(["--color_scale", "frame"])
    maps = np.load(tmp_path / "out" / "attention.npy")
    for map_, shared, own in zip(maps, together, alone, strict=True):
        scaled = (map_ - maps.min()) / (maps.max() - maps.min())
        np.testing.assert_array_equal(shared, inferno(scaled, bytes=True)[..., :3])
        scaled = (map_ - map_.min()) / (map_.max() - map_.min())
        np.testing.assert_array_equal(own, inferno(scaled, bytes=True)[..., :3])


def test_a_threshold_leaves_only_the_patches_that_hold_that_share(weights, tmp_path):
    frames = save_frames(tmp_path / "frames", suffix=".png")
    generate(
        frames,
        tmp_path / "out",
        "--pretrained_weights",
        weights,
        "--threshold",
        0.3,
        "--resize",
        32,
    )
    dark = plt.colormaps["inferno"](0.0, bytes=True)[:3]
    maps = np.load(tmp_path / "out" / "attention.npy")
    assert maps.shape == (COUNT, 4, 6)  # 32 x 49
    for i, map_ in enumerate(maps):
        picture = np.asarray(Image.open(tmp_path / "out" / "attention" / f"attn-picture{i}.png"))
        shown = (picture[4::8, 4::8] != dark).any(axis=-1)
        expected = keep_mass(torch.from_numpy(map_), 0.3).numpy() & (map_ > maps.min())
        np.testing.assert_array_equal(shown, expected)


def test_two_sizes_are_height_and_width(weights, tmp_path):
    frames = save_frames(tmp_path / "frames")
    pictures = generate(
        frames, tmp_path / "out", "--pretrained_weights", weights, "--resize", 24, 80
    )
    assert pictures[0].shape == (24, 80, 3)


def test_maps_alone_become_a_video_in_the_order_of_their_numbers(tmp_path):
    """Into a folder that does not exist, where the official code writes nothing."""
    maps = tmp_path / "maps"
    maps.mkdir()
    for value, number in ((60, 9999), (120, 10000), (180, 10001)):
        Image.new("RGB", (32, 16), (value,) * 3).save(maps / f"attn-frame-{number}.jpg")
    Image.new("RGB", (32, 16)).save(maps / "other.jpg")
    pictures = generate(
        maps, tmp_path / "new" / "out", "--video_only", "--video_format", "avi", "--fps", 25
    )
    assert [round(picture.mean() / 60) for picture in pictures] == [1, 2, 3]
    assert frames_per_second(tmp_path / "new" / "out" / "video.avi") == 25


def test_a_given_rate_wins_over_the_file_s_own(film, weights, tmp_path):
    generate(film, tmp_path, "--pretrained_weights", weights, "--fps", 25)
    assert frames_per_second(tmp_path / "video.mp4") == 25


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_an_earlier_longer_video_left_is_not_filmed(film, weights, tmp_path):
    """The official code films its frames too."""
    for folder, name in (("frames", "frame-0005.jpg"), ("attention", "attn-frame-0005.jpg")):
        (tmp_path / folder).mkdir()
        save(photograph(), tmp_path / folder / name)
        photograph().save(tmp_path / folder / "frame-mine.jpg")
    for _ in range(2):
        pictures = generate(film, tmp_path, "--pretrained_weights", weights)
        assert len(pictures) == COUNT
        for folder in ("frames", "attention"):
            assert len(list((tmp_path / folder).iterdir())) == COUNT + 1
            assert (tmp_path / folder / "frame-mine.jpg").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("frames/frame-0003.jpg", "frames/frame-9999.jpg", "attention/attn-other.png"),
        *("attention.npy", "video.mp4"),
    ],
)
def test_pictures_and_videos_of_others_are_not_replaced_or_removed(name, film, weights, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    photograph().save(path, "PNG" if path.suffix == ".png" else "JPEG")
    before = content_of(tmp_path)
    with pytest.raises(UserError, match=rf"{name} would be replaced.* --output_path\.$"):
        generate(film, tmp_path, "--pretrained_weights", weights)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("name", ["frames", "attention", "attention.npy", "video.mp4"])
def test_a_file_for_a_folder_or_a_folder_for_a_file_is_told_first(name, film, weights, tmp_path):
    path, is_file = tmp_path / name, "." not in name
    path.touch() if is_file else path.mkdir()
    message = rf"{name} is {'not a folder' if is_file else 'a folder'}"
    with pytest.raises(UserError, match=f"--output_path .*{message}"):
        generate(film, tmp_path, "--pretrained_weights", weights)
    assert list(tmp_path.iterdir()) == [path]


def test_frames_of_ones_own_are_input_beside_the_output(weights, tmp_path):
    """They are neither replaced nor taken for maps, whatever their names are."""
    frames = save_frames(tmp_path / "frames")
    for i, path in enumerate(sorted(frames.iterdir())):
        path.rename(frames / f"frame-{i:04}.jpg")
    before = content_of(frames)
    for _ in range(2):
        generate(frames, tmp_path, "--pretrained_weights", weights)
    assert content_of(frames) == before


def test_a_second_video_of_maps_replaces_the_first(tmp_path):
    save_frames(tmp_path / "maps", 2)
    for path in (tmp_path / "maps").iterdir():
        path.rename(path.with_name(f"attn-{path.name}"))
    for _ in range(2):
        assert len(generate(tmp_path / "maps", tmp_path, "--video_only")) == 2


def empty(folder):
    (folder / "data").mkdir()
    (folder / "data" / "notes.txt").touch()


def text_file(folder):
    (folder / "data").write_text("not a video")


def maps_alone(folder):
    save_frames(folder / "data", 1)
    (folder / "data" / "picture0.jpg").rename(folder / "data" / "attn-picture0.jpg")


def two_sizes(folder):
    save_frames(folder / "data", 2)
    photograph().resize((80, 40)).save(folder / "data" / "picture1.jpg")


def unreadable(folder):
    save_frames(folder / "data", 2)
    (folder / "data" / "picture1.jpg").write_bytes(b"no picture")


def frames(folder):
    save_frames(folder / "data", 2)


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (lambda folder: None, "", "--input_path .*data: no such file or folder"),
        (empty, "", r"there is no \*\.jpg \(or \.png\) in this folder"),
        (text_file, "", "cannot be read as a video"),
        (text_file, "--video_only", "neither a folder nor a video"),
        (frames, "--video_only", r"there is no attn-\*\.jpg"),
        (maps_alone, "", "holds maps: give --video_only"),
        (two_sizes, "", r"picture1\.jpg: 80 x 40 pixels, and the first frame has 68 x 44"),
        (unreadable, "", r"picture1\.jpg: cannot be read as an image"),
        (frames, "--resize 10 20 30", "--resize 10 20 30: give height and width"),
        (frames, "--resize 4", "do not hold a patch of 8 x 8. Enlarge it with --resize"),
        (frames, "--resize 0", "--resize"),
        (frames, "--fps 0", "--fps"),
        (frames, "--fps nan", "--fps"),
        (frames, "--threshold 1.5", "--threshold"),
        (frames, "--video_format gif", "--video_format"),
        (maps_alone, "--video_only --threshold 0.5", "--threshold has no effect with --video_only"),
        (maps_alone, "--video_only --side_by_side", "--side_by_side has no effect"),
        (frames, "--pretrained_weights missing.pth", r"missing\.pth: no such file"),
        (frames, "--arch resnet50 --pretrained_weights ''", "no class token"),
        (frames, "--output_path ''", "--output_path '' is empty"),
    ],
)
def test_wrong_data_or_flags_are_one_paragraph_before_the_network_is_built(
    make, flags, message, weights, tmp_path, monkeypatch, capsys
):
    make(tmp_path)
    source, output = tmp_path / "data", tmp_path / "out"
    command = f"--input_path {source} --output_path {output}"
    if "--video_only" not in flags:
        command += f" --pretrained_weights {weights}"
    monkeypatch.setattr("sys.argv", ["video_generation.py", *shlex.split(f"{command} {flags}")])
    with pytest.raises(SystemExit) as stopped:
        video_generation.main()
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert re.search(message, shown.err), shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not (output / "video.mp4").exists()
    assert "Loaded" not in shown.out or "patch of 8" in message


def test_the_input_is_not_overwritten(film, weights, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "video.mp4"
    copy.write_bytes(film.read_bytes())
    command = f"video_generation.py --input_path {copy} --output_path {tmp_path}"
    monkeypatch.setattr("sys.argv", shlex.split(f"{command} --pretrained_weights {weights}"))
    with pytest.raises(SystemExit):
        video_generation.main()
    assert "would be overwritten" in capsys.readouterr().err
    assert copy.read_bytes() == film.read_bytes()


@pytest.mark.parametrize(
    "command",
    [
        "--pretrained_weights dino_deitsmall8_pretrain.pth --input_path input/video.mp4"
        " --output_path output/ --fps 25",
        "--pretrained_weights dino_deitsmall8_pretrain.pth --input_path output/frames/"
        " --output_path output/ --resize 256",
        "--input_path output/attention --output_path output/ --video_only --video_format avi",
    ],
)
def test_commands_of_the_official_readme_are_understood(command):
    args = video_generation.get_args_parser().parse_args(command.split())
    assert args.output_path == "output/"


def test_defaults_are_the_official_ones_but_for_the_threshold_that_has_no_effect_there():
    args = video_generation.get_args_parser().parse_args(["--input_path", "x"])
    official = dict(arch="vit_small", patch_size=8, pretrained_weights="", output_path="./")
    official |= dict(checkpoint_key="teacher", resize=None, video_only=False, fps=30.0)
    official |= dict(video_format="mp4")
    assert {name: getattr(args, name) for name in official} == official
    assert args.threshold is None
