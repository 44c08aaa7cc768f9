# SPDX-License-Identifier: Apache-2.0
"""torch.hub's entries: official names, sizes and files; no clash with a caller's modules."""

import pytest
import torch
from conftest import ROOT, run_python

import hubconf
from dino.errors import UserError

# Facts of the official hubconf.py: width of the output, file; parameters counted there.
ENTRIES = {
    "dino_vits16": (384, "dino_deitsmall16_pretrain"),
    "dino_vits8": (384, "dino_deitsmall8_pretrain"),
    "dino_vitb16": (768, "dino_vitbase16_pretrain"),
    "dino_vitb8": (768, "dino_vitbase8_pretrain"),
    "dino_resnet50": (2048, "dino_resnet50_pretrain"),
    "dino_xcit_small_12_p16": (384, "dino_xcit_small_12_p16_pretrain"),
    "dino_xcit_small_12_p8": (384, "dino_xcit_small_12_p8_pretrain"),
    "dino_xcit_medium_24_p16": (512, "dino_xcit_medium_24_p16_pretrain"),
    "dino_xcit_medium_24_p8": (512, "dino_xcit_medium_24_p8_pretrain"),
}
PARAMETERS = {"dino_vits16": 21_665_664, "dino_vits8": 21_670_272, "dino_resnet50": 23_508_032}
PARAMETERS |= {"dino_vitb16": 85_798_656, "dino_vitb8": 85_807_872}


def local(entry, **options):
    return torch.hub.load(str(ROOT), entry, source="local", trust_repo=True, **options)


def test_the_hub_lists_the_nine_official_entries_alone():
    listed = [name for name in dir(hubconf) if not name.startswith("_")]  # as torch.hub.list does
    assert sorted(name for name in listed if callable(getattr(hubconf, name))) == sorted(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_builds_the_official_network_without_a_download(entry):
    with torch.device("meta"):
        model = local(entry, pretrained=False)
        assert model.training
        features = model.eval()(torch.empty(1, 3, 64, 64))
    assert features.shape == (1, ENTRIES[entry][0])
    if entry in PARAMETERS:
        assert sum(param.numel() for param in model.parameters()) == PARAMETERS[entry]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_asks_for_the_official_file(entry, asked):
    with pytest.raises(UserError, match="could not be downloaded"):
        getattr(hubconf, entry)()
    file = ENTRIES[entry][1]
    assert asked == [f"https://dl.fbaipublicfiles.com/dino/{file}/{file}.pth"]


@pytest.mark.parametrize("entry", ["dino_vits16", "dino_resnet50"])
def test_a_file_in_the_hubs_folder_is_loaded_whole(entry, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    expected = getattr(hubconf, entry)(pretrained=False).state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(expected, folder / f"{ENTRIES[entry][1]}.pth")
    found = getattr(hubconf, entry)().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_options_go_to_the_network_save_those_that_the_entry_sets():
    with torch.device("meta"):
        assert hubconf.dino_vits8(pretrained=False, img_size=[64]).pos_embed.shape == (1, 65, 384)
        with pytest.raises(TypeError, match="patch_size"):
            hubconf.dino_vits16(pretrained=False, patch_size=8)


CALLER = """
import sys, torch, utils, dino, dino.own, vision_transformer
assert utils.MINE and dino.own.MINE and vision_transformer.MINE
before = dict(sys.modules)
with torch.device("meta"):
    model = torch.hub.load({root!r}, "dino_vits16", source="local", pretrained=False)
    print(*model(torch.empty(1, 3, 32, 32)).shape)
for name in ("utils", "dino", "dino.own", "vision_transformer"):
    assert sys.modules[name] is before[name], name
assert "dino.backbones" not in sys.modules
"""


def test_a_callers_modules_of_the_same_names_stay_theirs(tmp_path):
    (tmp_path / "dino").mkdir()
    for file in ("utils.py", "vision_transformer.py", "dino/__init__.py", "dino/own.py"):
        (tmp_path / file).write_text("MINE = True\n")
    (tmp_path / "caller.py").write_text(CALLER.format(root=str(ROOT)))
    found = run_python("caller.py", cwd=tmp_path)
    assert found.stdout == "1 384\n", found.stderr
