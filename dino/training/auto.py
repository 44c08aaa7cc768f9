# SPDX-License-Identifier: Apache-2.0
"""--preset auto: settings that follow from the data, the device and the length of the run.

Rules in two parts: `fit_data` needs no more than a look at the images, `fit_length` the number of
iterations. What each rule was measured on is in benchmarks/small_data.md.
"""

import math

from dino.data.channels import find_white
from dino.data.images import ImageFiles
from dino.data.levels import set_white
from dino.data.survey import dark_images, survey
from dino.distributed import get_world_size, print0, rank_share
from dino.precision import has_fast_bfloat16
from dino.training.continuing import fit_continuation, keep_networks
from dino.training.data import check_batch
from dino.training.flag_checks import check_strengths, check_training_flags
from dino.training.settings import open_settings

DEFAULT_HOURS = 0.5

SMALLEST_CROP = 16  # pixels: a small ResNet leaves 2 x 2 of them
OFFICIAL_CROP = 224  # pixels; the official blur is made for it
# Pixels of a global crop, at most; with the stem of ImageNet half the work of 32 without.
CROP_ON_CPU = 96
# Where the place matters. At 48 and 96 clothes are told by their weave; photographs of things of
# 64 pixels give 46 % at 32 and 41 % at 64 after as many steps.
LAYOUT_ON_CPU = 32
SMALL = 64  # pixels of a global crop, below which a ResNet should not shrink it at once
# From so many images on the official recipe serves, which was made for 1.3 million.
LIKE_IMAGENET = 200_000
IMAGES_PER_OUTPUT = 8  # of the head
# For 256 images: a ViT's, a ResNet's. The batches of a CPU have 64, and so a quarter of these. With
# AdamW a ResNet-18 learned at 0.002 in batches of 256, and hardly at 0.006.
LEARNING_RATES = {"cpu": (0.004, 0.006), "gpu": (0.001, 0.002)}
# The teacher averages over this share of the run; the official one over 250 of its 125,000.
TEACHER_SHARE = 0.02
FASTEST_TEACHER, OFFICIAL_TEACHER = 25, 250  # iterations


def decide_settings(
    args, images, device, correlate_views, time_a_step, weights=None, own_views=False
):
    """`args` with every flag decided that was not given; `auto` in it maps these to their reasons.

    Prints the table of them. `args.given` has the names of the flags that were given. A run that
    is resumed keeps its settings.
    `correlate_views(args)`: see view_correlation; `time_a_step(args)`: seconds. `weights`: the
    content of --init_from, if a run begins with it. `own_views`: the flags of the crops are not
    used.
    """
    settings, resumes = open_settings(args)
    if not resumes:
        check_strengths(args)
        skip_bad = args.on_bad_image == "skip"
        if weights is not None:
            keep_networks(settings, weights)
        fit_white(settings, images)
        seen = survey(images, args.seed, skip_bad, args.in_chans)
        print0(f"--preset {args.preset}: {seen}")
        if dark := dark_images(seen.brightest):
            print0(f"Warning: {dark}")
        settings.decide("warmup_epochs", 0, "until the length is known")
        fit_data(settings, seen, device.type, get_world_size())
        iterations = rank_share(len(images)) // settings["batch_size_per_gpu"]
        check_training_flags(settings.namespace(), own_views)
        check_batch(settings.namespace(), len(images))
        if not own_views:
            soften_views(settings, lambda: correlate_views(settings.namespace()))
        if "epochs" not in settings.given:
            seconds = time_a_step(settings.namespace())
            fit_hours(settings, seconds, iterations)
        fit_length(settings, iterations)
        if weights is not None:
            fit_continuation(settings, weights)
    return settings.conclude()


# Strengths of the augmentation, tried in order until the views of an image correlate by the least.
# Clothes and drawings at 0.04 to 0.05 were learned from, digits at 0.00 were not.
STRENGTHS, LEAST_CORRELATION = (1.0, 0.5, 0.25), 0.02


# ---- what follows from the data ----


def fit_white(settings, images):
    """Decide which number is white, before the images are looked at, and read them so."""
    white = find_white(images.paths) if isinstance(images, ImageFiles) else 0.0
    if white:
        bits = int(white).bit_length()
        settings.decide("white", white, f"the files use {bits} of their 16 bits")
    set_white(settings["white"])


def fit_data(settings, survey, device_type, processes):
    """Decide what needs no more than a look at the data: networks, views, batch, learning rate."""
    if len(survey.mean) != 3:
        settings.decide("in_chans", len(survey.mean), "what the files have")
    fit_crops(settings, survey, device_type)
    fit_views(settings, survey)
    if layout_matters(survey, device_type):
        keep_layout(settings, survey)
    fit_backbone(settings, survey, device_type)
    fit_batch(settings, survey, device_type, processes)
    fit_head(settings, survey)
    fit_optimisation(settings, device_type)


def layout_matters(survey, device_type):
    """Whether to take settings that preserve positions: on a CPU alone, not measured on GPUs."""
    return survey.has_layout and device_type == "cpu"


def fit_crops(settings, survey, device_type):
    """Sizes of the crops: those of the images, as far as the device can afford them."""
    side = survey.sides[1]
    most, why = largest_crop(survey, device_type)
    size = max(SMALLEST_CROP, min(most, side // 8 * 8))
    reason = f"the images' {side} pixels"
    if size == most:
        reason = f"{why} of {reason}" if side > most else reason
    elif side < 16:
        reason = f"the minimum for a ResNet; the images have {side}"
    settings.decide("global_crop_size", size, reason)
    if layout_matters(survey, device_type) and side > settings["global_crop_size"]:
        finer = "the size of a crop: finer detail, such as a weave, identifies single images"
        settings.decide("shrink_images", settings["global_crop_size"], finer)
    if survey.images >= LIKE_IMAGENET and size == OFFICIAL_CROP:
        return  # the official local crops
    size = settings["global_crop_size"]
    local = max(SMALLEST_CROP, size // 2 // 8 * 8)
    half = "half of it, about the official ratio"
    least = "not less: to a ResNet views of fewer pixels have nothing in common with the others"
    settings.decide("local_crop_size", local, half if local > SMALLEST_CROP else least)
    settings.decide("local_crops_number", 4, "half of the official ones: more steps for the time")


def largest_crop(survey, device_type):
    """(pixels of a global crop at most, what they are)."""
    if layout_matters(survey, device_type):
        return LAYOUT_ON_CPU, "what outlines need"
    pixels = CROP_ON_CPU if device_type == "cpu" else OFFICIAL_CROP
    return pixels, f"what a {device_name(device_type)} can afford"


def device_name(device_type):
    """CPU or GPU, for torch's cpu or cuda."""
    return "CPU" if device_type == "cpu" else "GPU"


def fit_views(settings, survey):
    """Strengths of the augmentation, and the normalisation."""
    local, size = settings["local_crop_size"], settings["global_crop_size"]
    side = min(survey.sides[1], settings["shrink_images"] or math.inf)
    least = round(max(0.05, min(0.5, (0.75 * local / side) ** 2)), 3)
    why = {0.05: "the official one", 0.5: "large, as the images are small"}
    settings.decide(
        "local_crops_scale",
        (least, max(0.4, round(1.5 * least, 3))),
        why.get(least, "no local crop is enlarged by more than a third"),
    )
    settings.decide(
        "min_crop_pixels",
        round(min(0.75 * local, side * least**0.5)),
        "the same for each image, whatever its size",
    )
    settings.decide(
        "blur_radius",
        tuple(round(radius * size / OFFICIAL_CROP, 4) for radius in (0.1, 2.0)),
        f"the official 0.1 to 2 pixels of {OFFICIAL_CROP}, in proportion",
    )
    if survey.is_grey:
        grey = "the images are grey: brightness is most of what they have"
        settings.decide("jitter", (0.2, 0.2, 0.0, 0.0), grey)
        settings.decide("solarize_p", 0.0, grey)
        settings.decide("grayscale_p", 0.0, "grey images cannot lose their colours")
    settings.decide("augment", "device", "0.5 to 0.7 of Pillow's time on a CPU")
    settings.decide("mean", survey.mean, "measured on the sample")
    settings.decide("std", survey.std, "measured on the sample")


def keep_layout(settings, survey):
    """Views for data in which it matters where something is, in the short runs of a CPU.

    Large crops keep the layout. Images are told apart by their colours most easily: the more crops
    are grey, the more the outlines count. With a share of 0.5 and strong jitter classes that are
    told by their colours are not learned, with 0.2 those that are told by outlines. In grey images
    brightness plays the role of colour.
    """
    layout = f"large: {survey.layout:.1%} of the variance is due to the place in the image"
    settings.decide("global_crops_scale", (0.6, 1.0), layout)
    least, most = settings["local_crops_scale"]
    settings.decide("local_crops_scale", (max(0.25, least), max(0.6, most)), layout)
    settings.decide("solarize_p", 0.0, "off, as in the runs that were measured")
    outlines = "so that outlines are learned besides"
    if survey.is_grey:
        settings.decide("jitter", (0.4, 0.4, 0.0, 0.0), f"the official one, {outlines} brightness")
    else:
        settings.decide("grayscale_p", 0.35, f"{outlines} colours")


def soften_views(settings, correlate):
    """Weaken the augmentation until the views of an image have something in common.

    `correlate()` measures that under the settings as they are.
    """
    strong, found = dict(settings.flags), 1.0
    for strength in STRENGTHS:
        if strength < 1:
            reason = f"softer: views of an image correlated by only {found:.2f} before training"
            for name in ("global_crops_scale", "local_crops_scale"):
                least, most = strong[name]
                least = round(1 - strength * (1 - least), 3)
                settings.decide(name, (least, max(most, least)), reason)
            jitter = tuple(round(strength * change, 3) for change in strong["jitter"])
            settings.decide("jitter", jitter, reason)
            settings.decide("solarize_p", 0.0, reason)
        found = correlate()
        if found >= LEAST_CORRELATION:
            break
    print0(f"Views of an image correlate by {found:.2f} in a network that has not been trained.")


def fit_backbone(settings, survey, device_type):
    """A small convnet, unless data and device are like those of the paper."""
    ask = "for attention maps: --arch vit_nano" if device_type == "cpu" else "or: --arch vit_small"
    if device_type == "cpu":
        has_layout = layout_matters(survey, device_type)
        arch = "resnet_nano_2x2" if has_layout else "resnet_nano"
        keeps = ", and keeps quarters of the image apart" if has_layout else ""
        why = f"learns faster than a ViT on a CPU{keeps}; {ask}"
    elif survey.images < LIKE_IMAGENET:
        expected = f"expected to learn faster than a ViT from {survey.images} images"
        arch, why = "resnet18", f"{expected} (not measured on a GPU); {ask}"
    else:
        arch, why = "vit_small", f"as in the paper: {survey.images} images"
    settings.decide("arch", arch, why)
    size = settings["global_crop_size"]
    if settings.is_vit:
        patch = next((p for p in (16, 8, 4, 2) if size // p >= 8), 2)
        while size % patch or settings["local_crop_size"] % patch:
            patch //= 2
        settings.decide("patch_size", max(1, patch), f"at least 8 x 8 patches of {size} pixels")
    elif settings["arch"].startswith("resnet"):
        if size < SMALL:
            settings.decide("stem", "small", f"crops of {size} pixels must not be shrunk at once")
        else:
            settings.decide("stem", "imagenet", f"crops of {size} pixels can be shrunk at once")


def fit_batch(settings, survey, device_type, processes):
    """At least 8 batches an epoch, of a power of two; of 4 images where that leaves fewer."""
    usual = 64 if device_type == "cpu" else 256 // min(processes, 8)
    share = survey.images / processes
    batch = min(usual, 2 ** int(math.log2(max(min(4, share), share / 8, 1))))
    few = "at least 8 batches an epoch" if share >= 8 * batch else "the minimum"
    why = "usual" if batch == usual else f"{few}, of {survey.images} images"
    settings.decide("batch_size_per_gpu", batch, why)


def fit_head(settings, survey):
    """Outputs in proportion to the images, and batch norm, without which small runs collapse."""
    outputs = 2 ** round(math.log2(max(1, survey.images / IMAGES_PER_OUTPUT)))
    outputs = min(65536, max(256, outputs))
    settings.decide("out_dim", outputs, f"one for every {IMAGES_PER_OUTPUT} images, 256 to 65536")
    if survey.images < LIKE_IMAGENET:
        settings.decide("use_bn_in_head", True, "keeps runs on small data from collapsing")
    if settings["out_dim"] <= 8192:
        settings.decide("head_hidden_dim", 512, f"enough for {settings['out_dim']} outputs")
        settings.decide("head_bottleneck_dim", 128, "as above")


def fit_optimisation(settings, device_type):
    """The highest learning rate that was stable, and the fastest type."""
    if device_type == "cpu" and not settings.is_vit and has_fast_bfloat16():
        settings.decide("amp_dtype", "bfloat16", "half the time of a step on this CPU")
    if settings["arch"] == "vit_small" and settings["out_dim"] == 65536:
        return  # the official recipe
    of_vit, of_resnet = LEARNING_RATES["cpu" if device_type == "cpu" else "gpu"]
    lr = of_vit if settings.is_vit else of_resnet
    settings.decide("lr", lr, "short runs need a high one; for 256 images, by the linear rule")


# ---- what follows from the length ----


SPENT_ON_STEPS = 0.93  # of the time; the rest measures, saves and draws
WARM_UP = 1000  # iterations, in long runs; the official one has 12,500 of 125,000
UNSAVED = 200  # iterations between two writes of checkpoint.pth
NUMBERED = 10  # checkpoints that a run keeps


def fit_hours(settings, seconds, iterations_per_epoch):
    """As many epochs as fit into the hours, at `seconds` a step; at least one."""
    hours = settings["hours"] or DEFAULT_HOURS
    seconds_per_epoch = seconds * max(1, iterations_per_epoch)
    epochs = min(10**5, max(1, int(SPENT_ON_STEPS * 3600 * hours / seconds_per_epoch)))
    told = "" if settings["hours"] else " (default)"
    reason = f"as many as fit into {hours:g} hours{told} at {seconds:.2g} s a step"
    if seconds_per_epoch > 3600 * hours:
        reason = f"minimum: one takes {seconds_per_epoch / 3600:.2g} hours, more than {hours:g}"
    settings.decide("epochs", epochs, reason)


def fit_length(settings, iterations_per_epoch):
    """Decide what depends on the number of iterations, once `epochs` is known."""
    epochs = settings["epochs"]
    iterations = epochs * iterations_per_epoch
    horizon = min(OFFICIAL_TEACHER, max(FASTEST_TEACHER, TEACHER_SHARE * iterations))
    share = f"{horizon / iterations:.1%} of {iterations}"
    if horizon == FASTEST_TEACHER:
        share = f"the fewest that it takes, of {iterations}"
    settings.decide(
        "momentum_teacher",
        round(1 - 1 / horizon, 4),
        f"an average over {horizon:.0f} steps, {share}",
    )
    if horizon < OFFICIAL_TEACHER:
        settings.decide(
            "momentum_teacher_end",
            round(1 - 1 / (4 * horizon), 4),
            "the teacher keeps up with the student; the official 1 is for long runs",
        )
    settings.decide("warmup_epochs", *warm_up(epochs, iterations_per_epoch))
    frozen = 1 if epochs >= 10 else 0
    settings.decide(
        "freeze_last_layer", frozen, f"with --epochs {epochs}; the official 1 is of 100"
    )
    every = max(1, epochs // 6)
    settings.decide("knn_freq", every, f"measurements while training: {math.ceil(epochs / every)}")
    fit_saves(settings, iterations_per_epoch)


def warm_up(epochs, iterations_per_epoch):
    """(epochs of warm-up, why): the official ten, unless they have few iterations."""
    most = max(10, math.ceil(WARM_UP / iterations_per_epoch))
    if round(0.1 * epochs) <= most:
        return round(0.1 * epochs), "a tenth of the run"
    return most, f"{most * iterations_per_epoch} iterations, enough for long runs"


def fit_saves(settings, iterations_per_epoch):
    """Small data make short and many epochs; a checkpoint of each would cost more than they."""
    every = math.ceil(UNSAVED / iterations_per_epoch)
    if every > 1:
        reason = f"epochs of {iterations_per_epoch} iterations are short"
        settings.decide("resume_freq", every, reason)
    if settings["epochs"] > 20 * NUMBERED:
        every = math.ceil(settings["epochs"] / NUMBERED)
        settings.decide("saveckp_freq", every, f"{NUMBERED} numbered checkpoints")
