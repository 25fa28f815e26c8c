"""Images to calibrate and judge with: every kind of source, every kind of image, and what is refused."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evm_deploy.data.images import calibration_images, labelled_images, sample
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.sources import find_images, image_suffixes
from evm_deploy.demo import digits, write_images
from evm_deploy.errors import CalibrationError
from evm_deploy.export.selftest import synthetic_image

PRE = Preprocessing((32, 32))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """120 different images, some in folders."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(120):
        path = folder / ("ab"[i % 2] if i % 3 else ".") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(synthetic_image(40, 50, seed=i)).save(path)
    return folder


def labelled(*given, **options):
    return labelled_images(*given, **options).all()


def refused(source, match, **options):
    with pytest.raises(CalibrationError, match=match) as error:
        calibration_images(source, PRE, **options)
    return str(error.value)


def test_a_folder_is_searched_whole_and_sampled_by_seed(images):
    everything = calibration_images(images, PRE)
    assert (len(everything), everything.skipped) == (120, ())
    assert all(pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 for pixels in everything.pixels())
    some = calibration_images(images, PRE, 110, seed=1)
    names = [p.name for p in some.items]
    assert len(set(names)) == 110 and names == sorted(names)
    assert some == calibration_images(images, PRE, 110, seed=1)
    assert some != calibration_images(images, PRE, 110, seed=2)


def test_lists_and_arrays_are_the_same_images(images, tmp_path):
    names = [p.name for p in find_images(images)]
    listed = images / "list.txt"
    listed.write_text("# chosen\n" + "\n".join(names) + "\n\n")
    arrays = tmp_path / "images.npz"
    np.savez(arrays, images=np.stack([np.asarray(Image.open(images / name)) for name in names]))
    sets = [calibration_images(source, PRE) for source in (images, listed, arrays)]
    a, b, c = (np.stack(list(found.pixels())) for found in sets)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    assert sets[0].digest() == sets[1].digest() != sets[2].digest()


def test_the_digest_follows_content_order_and_preprocessing(images):
    chosen = calibration_images(images, PRE)
    assert chosen.digest() == calibration_images(images, PRE).digest()
    assert chosen.digest() != calibration_images(images, Preprocessing((32, 32), crop_pct=1.0)).digest()
    assert chosen.digest() != calibration_images(images, PRE, 119).digest()


def test_every_kind_of_image_is_read(images, tmp_path):
    for i in range(110):
        Image.fromarray(synthetic_image(40, 50, seed=i)).save(tmp_path / f"{i}.png")
    shot = Image.fromarray(synthetic_image(50, 40, seed=500))
    shot.convert("L").save(tmp_path / "grey.png")
    shot.convert("RGBA").save(tmp_path / "alpha.png")
    shot.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.asarray(shot.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    shot.save(tmp_path / "turned.JPG", exif=exif)
    images = calibration_images(tmp_path, PRE)
    assert (len(images), images.skipped) == (115, ())


def test_a_few_unreadable_ones_are_named_and_left_out(images, tmp_path):
    for i in range(120):
        Image.fromarray(synthetic_image(40, 50, seed=i)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    images = calibration_images(tmp_path, PRE)
    assert len(images) == 120
    assert [text.split(":")[0] for text in images.skipped] == ["broken.png", "cut.png"]
    for i in range(10):
        (tmp_path / f"more{i}.png").write_bytes(b"no image")
    assert "12 of 132 images cannot be read: broken.png" in refused(tmp_path, "cannot be read", force=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: np.zeros((20, 20, 3), np.uint8), "120 of 120 images have a single colour"),
        (lambda i: np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8), "look like random noise"),
        (lambda i: synthetic_image(40, 50, seed=i % 60), "60 of 120 images are copies of other images"),
    ],
)
def test_unfit_images_are_refused_unless_forced(make, message, tmp_path):
    for i in range(120):
        Image.fromarray(make(i)).save(tmp_path / f"{i}.png")
    assert "--force-calib" in refused(tmp_path, message)
    assert len(calibration_images(tmp_path, PRE, force=True)) == 120


def test_too_few_are_refused_unless_forced(tmp_path):
    Image.fromarray(synthetic_image(20, 20, seed=0)).save(tmp_path / "one.png")
    refused(tmp_path, "1 images are too few, at least 100")
    assert len(calibration_images(tmp_path, PRE, force=True)) == 1


def test_sources_that_hold_nothing_are_named(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "no images found")
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path / "notes.txt", "no images found")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "bytes.txt", "not UTF-8")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    refused(tmp_path / "broken.npz", r"cannot be read as \.npz")
    np.savez(tmp_path / "floats.npz", images=np.zeros((3, 4, 4, 3)))
    refused(tmp_path / "floats.npz", r"uint8 \(n, H, W\)(?s:.*)float64 \[3, 4, 4, 3\]")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    refused(tmp_path / "two.npz", "found: a, b")


def test_the_demos_digits_are_fit_to_calibrate_with(tmp_path):
    write_images(tmp_path, "train")
    assert len(calibration_images(tmp_path, Preprocessing((64, 64), crop_pct=1.0))) == 512


def test_classes_come_from_folders_or_a_csv(tmp_path):
    count = write_images(tmp_path, "heldout", 80)
    images = labelled(tmp_path, PRE, 10, [str(i) for i in range(10)])
    want = np.sort(digits("heldout")[1][:count])
    np.testing.assert_array_equal(images.labels, want)
    lines = [f"{p.name},{p.name.split('/')[0]}" for p in find_images(tmp_path)]
    for heading in ([], ["path,class"]):
        (tmp_path / "val.csv").write_text("\n".join([*heading, *lines]))
        np.testing.assert_array_equal(labelled(tmp_path / "val.csv", PRE, 10).labels, want)


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [(("07", "3"), 8, [7, 3]), (("²", "3"), 2, [1, 0]), (("9" * 5000, "3"), 2, [1, 0])],
    ids=["zeros", "superscript", "long"],
)
def test_names_that_are_digits_and_those_that_only_look_so(names, classes, labels, tmp_path):
    for file in ("a.png", "b.png"):
        Image.fromarray(synthetic_image(20, 20, seed=1)).save(tmp_path / file)
    (tmp_path / "val.csv").write_text("".join(f"{f},{n}\n" for f, n in zip(("a.png", "b.png"), names, strict=True)))
    assert labelled(tmp_path / "val.csv", PRE, classes).labels == labels


def test_folders_with_other_names_go_by_the_alphabet(tmp_path):
    for name in ("n02", "n01", "n03"):
        (tmp_path / name).mkdir()
        Image.fromarray(synthetic_image(20, 20, seed=len(name))).save(tmp_path / name / "a.png")
    assert labelled(tmp_path, PRE, 3).labels == [0, 1, 2]
    assert labelled(tmp_path, PRE, 4, ["n03", "n02", "x", "n01"]).labels == [3, 1, 0]
    for classes, labels in ((4, None), (2, ["cat", "dog"])):
        with pytest.raises(CalibrationError, match=rf"3 classes \(n01, n02, n03\), the head has {classes}"):
            labelled(tmp_path, PRE, classes, labels)


def test_labelled_sources_without_classes_are_refused(images, tmp_path):
    with pytest.raises(CalibrationError, match="is not in a class folder"):
        labelled(images, PRE, 10)
    (tmp_path / "val.csv").write_text("a.png;3\n")
    with pytest.raises(CalibrationError, match="path,class"):
        labelled(tmp_path / "val.csv", PRE, 10)


def test_a_first_image_that_is_missing_is_no_heading(tmp_path):
    Image.fromarray(synthetic_image(20, 20, seed=1)).save(tmp_path / "b.png")
    (tmp_path / "val.csv").write_text("a.png,0\nb.png,1\n")
    with pytest.raises(CalibrationError, match=r"1 of 2 images cannot be read: a\.png"):
        labelled(tmp_path / "val.csv", PRE, 2)


def test_sampling_keeps_all_when_there_are_no_more(images):
    found = find_images(images)
    assert sample(found, 500) == found


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "no array `labels` of 3 whole numbers"),
        (np.zeros(2, np.int64), "no array `labels` of 3 whole numbers"),
        (np.zeros(3), "no array `labels` of 3 whole numbers"),
        (np.array([0, 1, 2]), "label 2, but the head has 2 classes"),
        (np.array([0, -1, 1]), "label -1, but the head has 2 classes"),
        (np.array([1, 0, 1]), ""),
    ],
)
def test_an_npz_of_labelled_images(labels, message, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    np.savez(tmp_path / "val.npz", images=images, **({} if labels is None else {"labels": labels}))
    if message:
        with pytest.raises(CalibrationError, match=re.escape(message)):
            labelled(tmp_path / "val.npz", Preprocessing((32, 32)), 2)
    else:
        assert list(labelled(tmp_path / "val.npz", Preprocessing((32, 32)), 2).labels) == [1, 0, 1]


# ------------------------------------------------------------------------------------- folders as systems leave them


def shot(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(synthetic_image(40, 50, seed=seed)).save(path)


def names(source):
    return [item.name for item in find_images(source)]


@pytest.mark.parametrize(
    "litter",
    [
        "._a.png",
        ".hidden.png",
        ".ipynb_checkpoints/a-checkpoint.png",
        ".git/a.png",
        "__MACOSX/cat/a.png",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.png",
        "$RECYCLE.BIN/a.png",
        "cat/.thumbnails/a.png",
        "cat/._a.png",
    ],
)
def test_litter_of_systems_is_no_image_and_no_class(litter, tmp_path):
    shot(tmp_path / "cat" / "a.png", 1)
    shot(tmp_path / "dog" / "a.png", 2)
    shot(tmp_path / litter, 3)
    for file in ("Thumbs.db", ".DS_Store", "desktop.ini", "cat/Thumbs.db", "cat/notes.txt"):
        (tmp_path / file).write_bytes(b"x")
    assert names(tmp_path) == ["cat/a.png", "dog/a.png"]
    for labels in (None, ["cat", "dog"]):
        assert labelled(tmp_path, PRE, 2, labels).labels == [0, 1]


def test_a_source_that_is_hidden_itself_is_searched(tmp_path):
    shot(tmp_path / ".data" / "a.png")
    assert names(tmp_path / ".data") == ["a.png"]


def test_linked_folders_are_data(tmp_path):
    for i, name in enumerate(("cat", "dog")):
        shot(tmp_path / "real" / name / "a.png", i)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("cat", "dog"):
        (data / name).symlink_to(tmp_path / "real" / name)
    assert names(data) == ["cat/a.png", "dog/a.png"]
    assert labelled(data, PRE, 2).labels == [0, 1]
    (tmp_path / "linked").symlink_to(data)
    assert names(tmp_path / "linked") == ["cat/a.png", "dog/a.png"]
    (data / "dog" / "link.png").symlink_to(tmp_path / "real" / "cat" / "a.png")
    assert "dog/link.png" in names(data)


def test_links_into_a_hidden_store_below_the_source_are_followed(tmp_path):
    shot(tmp_path / ".store" / "1" / "a.png")
    (tmp_path / "cat").symlink_to(tmp_path / ".store" / "1")
    assert names(tmp_path) == ["cat/a.png"]


@pytest.mark.parametrize(
    ("link", "to"),
    [("a/loop", "."), ("a/loop", "a"), ("loop", "."), ("a/loop", "b"), ("a/loop", ".."), ("self", "self")],
)
def test_links_in_a_circle_end_and_repeat_nothing(link, to, tmp_path):
    data = tmp_path / "data"
    shot(data / "a" / "1.png", 1)
    shot(data / "b" / "2.png", 2)
    (data / "b" / "back").symlink_to(data / "a")
    (data / link).symlink_to(data / to)
    found = names(data)
    assert [name for name in found if name != "self"] == ["a/1.png", "b/2.png"]


def test_circles_outside_of_the_source_end(tmp_path):
    data, one, two = (tmp_path / name for name in ("data", "one", "two"))
    shot(one / "1.png")
    shot(two / "2.png")
    data.mkdir()
    (one / "two").symlink_to(two)
    (two / "one").symlink_to(one)
    (data / "class").symlink_to(one)
    assert names(data) == ["class/1.png", "class/two/2.png"]


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(tmp_path):
    for i in range(40):
        shot(tmp_path / f"{i:02d}.png", i)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert ["gone: image" in text for text in calibration_images(tmp_path, PRE, force=True).skipped] == [True]


def test_a_pipe_is_no_image(tmp_path):
    shot(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(tmp_path) == ["a.png"]  # opening it would wait for ever


def test_every_suffix_that_pillow_opens_is_found(tmp_path):
    suffixes = image_suffixes()
    assert {".jfif", ".pgm", ".jpe", ".avif", ".jp2", ".tga", ".tiff", ".webp", ".mpo", ".dib"} <= suffixes
    assert not {".pdf", ".h5", ".mpg", ".txt", ".db", ".json", ".npz", ""} & suffixes
    read = {}
    for suffix in sorted(suffixes):
        path = tmp_path / f"a{suffix.upper()}"
        try:
            Image.fromarray(synthetic_image(64, 64, seed=1)).save(path, format=Image.registered_extensions()[suffix])
        except (OSError, KeyError, ValueError):
            path.unlink(missing_ok=True)
        else:
            read[path.name] = Preprocessing((32, 32)).pixels(path)
    assert len(read) > 25 and names(tmp_path) == sorted(read)


# ---------------------------------------------------------------------------------------------- lists and their classes

LINES = {
    "text": ("val.txt", "{path} {name}"),
    "tabs": ("val_map.txt", "{path}\t{name}"),
    "text with commas": ("val.txt", "{path}, {name}"),
    "spaces": ("list", "{path}   {name}  "),
    "csv": ("val.csv", "{path},{name}"),
    "quoted csv": ("VAL.CSV", '"{path}","{name}"'),
    "csv with spaces": ("val.csv", "{path}, {name}"),
}


@pytest.mark.parametrize("form", LINES)
@pytest.mark.parametrize("classes", [["0", "1"], ["cat", "dog"], ["golden retriever", "tabby cat"]], ids=str)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"], ids=repr)
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "bom"])
def test_lists_with_classes(form, classes, end, bom, tmp_path):
    file, line = LINES[form]
    for i, name in enumerate(("a.png", "my images/b (1).JPEG")):
        shot(tmp_path / name, i)
    rows = [("a.png", classes[1]), ("my images/b (1).JPEG", classes[0])]
    text = bom + end.join(line.format(path=path, name=name) for path, name in rows) + end
    (tmp_path / file).write_bytes(text.encode())
    labels = None if classes[0] == "0" else classes
    assert labelled(tmp_path / file, PRE, 2, labels).labels == [1, 0]
    assert len(calibration_images(tmp_path / file, PRE, force=True)) == 2  # the classes are ignored


@pytest.mark.parametrize("heading", ["path class", "filename\tlabel", "image label"])
def test_a_heading_of_a_list_is_no_image(heading, tmp_path):
    shot(tmp_path / "a.png")
    (tmp_path / "val.txt").write_text(f"{heading}\na.png 1\n")
    assert labelled(tmp_path / "val.txt", PRE, 2).labels == [1]


def test_a_list_of_paths_takes_the_folders_as_classes(tmp_path):
    for i, name in enumerate(("val/cat/a.png", "val/dog/b c.png")):
        shot(tmp_path / name, i)
    (tmp_path / "val.txt").write_text(f"val/dog/b c.png\n{tmp_path}/val/cat/a.png\n")
    assert labelled(tmp_path / "val.txt", PRE, 2, ["cat", "dog"]).labels == [1, 0]


@pytest.mark.parametrize("text", ["a.png\n", "a.png 1\nb.png\n", "", "# a.png 1\n"])
@pytest.mark.parametrize("file", ["val.txt", "val.csv"])
def test_lines_without_a_class_are_refused(text, file, tmp_path):
    shot(tmp_path / "a.png")
    shot(tmp_path / "b.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(CalibrationError):
        labelled(tmp_path / file, PRE, 2)


# ------------------------------------------------------------------------------------------------- the order of classes


def class_folders(root, folders):
    for i, name in enumerate(folders):
        shot(root / name / "a.png", i)
    return root


def as_csv(root, folders):
    class_folders(root, folders)
    (root / "val.csv").write_text("".join(f"{name}/a.png,{name}\n" for name in folders))
    return root / "val.csv"


@pytest.mark.parametrize("make", [class_folders, as_csv])
@pytest.mark.parametrize(
    ("folders", "labels", "classes", "want", "order"),
    [
        (["cat", "dog", "zebra"], ["zebra", "cat", "dog"], 3, [1, 2, 0], "by name"),
        (["cat"], ["zebra", "cat", "dog"], 3, [1], "by name"),
        (["0", "2"], ["zebra", "cat", "dog"], 3, [0, 2], "by number"),
        (["1", "2"], ["2", "1", "0"], 3, [1, 0], "by name"),
        (["cafe\u0301", "dog"], ["caf\u00e9", "dog"], 2, [0, 1], "by name"),  # macOS
        (["cat", "dog", "zebra"], None, 3, [0, 1, 2], "in alphabetical order: cat is 0"),
        ([str(i) for i in range(12)], None, 12, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], "ImageFolder"),
        (["00", "01", "10"], None, 20, [0, 1, 10], "by number"),
        ([str(i) for i in range(1, 4)], None, 3, [0, 1, 2], "alphabetical"),
    ],
)
def test_the_order_of_classes_is_said(make, folders, labels, classes, want, order, tmp_path):
    images = labelled(make(tmp_path, sorted(folders)), PRE, classes, labels)
    assert images.labels == want
    assert order in images.order


def test_only_an_order_that_differs_mentions_the_other(tmp_path):
    assert "ImageFolder" not in labelled(class_folders(tmp_path, ["0", "1", "2"]), PRE, 3).order


@pytest.mark.parametrize("make", [class_folders, as_csv])
@pytest.mark.parametrize(
    ("folders", "labels", "says"),
    [
        (["zebra", "cat", "dog", "airlner"], ["zebra", "cat", "dog", "airliner"], ("airlner", "did you mean airliner")),
        (["Zebra", "Cat"], ["zebra", "cat"], ("Cat, Zebra", "zebra, cat")),
        (["n01", "n02", "n03"], ["tench", "goldfish", "shark"], ("n01, n02, n03", "tench, goldfish, shark")),
        (["0", "1", "2"], ["1", "2", "3"], ("0", "3")),  # neither names nor indices
        (["cat", "7"], ["cat", "dog"], ("7", "dog")),
        (["crane"], ["crane", "dog", "crane"], ("crane is ambiguous", "0 and 2")),
        (["3", "4"], ["a", "b"], ("3, 4", "a, b")),
    ],
)
def test_names_that_are_not_among_the_labels_are_refused(make, folders, labels, says, tmp_path):
    with pytest.raises(CalibrationError) as error:
        labelled(make(tmp_path, sorted(folders)), PRE, len(labels), labels)
    assert all(each in str(error.value) for each in says), error.value


@pytest.mark.parametrize(
    ("folders", "labels", "want"),
    [
        (["0", "1"], None, [0, 1]),
        (["cat", "dog"], None, [0, 1]),
        (["cat", "other"], ["cat"], [1, 0]),  # the label names what is present, whatever the alphabet says
        (["cat"], ["cat"], [1]),
        (["0", "1"], ["cat"], [0, 1]),
        (["1"], ["cat"], [1]),
        (["dog", "wolf"], ["cat"], None),
        (["a", "b", "cat"], ["cat"], None),
        (["a", "b", "c"], None, None),
    ],
)
def test_a_head_of_one_class_has_absent_and_present(folders, labels, want, tmp_path):
    source = class_folders(tmp_path, folders)
    if want is None:
        with pytest.raises(CalibrationError):
            labelled(source, PRE, 1, labels)
    else:
        assert labelled(source, PRE, 1, labels).labels == want


# ---------------------------------------------------------------------------------------------------- decoded once


def test_images_are_decoded_once(images, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: (opened.append(a), real(*a, **k))[1])
    chosen = calibration_images(images, PRE)
    first = [pixels.copy() for pixels in chosen.pixels()]
    for _ in range(3):
        np.testing.assert_array_equal(np.stack(list(chosen.pixels())), first)
    assert len(opened) == len(chosen)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    again = calibration_images(images, PRE)
    assert again == chosen and all(item.decoded is None for item in again.items)
    np.testing.assert_array_equal(np.stack(list(again.pixels())), first)
    assert len(opened) == 3 * len(chosen)


def test_decoded_images_leave_no_file(images, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chosen = calibration_images(images, PRE)
    assert not list(tmp_path.iterdir()) and chosen.items[0].decoded is not None


def test_a_full_disk_costs_time_alone(images, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    chosen = calibration_images(images, PRE)
    assert chosen.items[0].decoded is None and len(list(chosen.pixels())) == 120


def test_progress_counts_images(images):
    seen = []
    chosen = calibration_images(images, PRE, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 120) for i in range(120)]
    list(replace(chosen, progress=lambda done, total: seen.append(total)).pixels())
    assert seen[120:] == [120] * 120


def test_a_file_of_boxes_is_no_list_of_classes(tmp_path):
    (tmp_path / "instances.json").write_text('{"images": []}')
    with pytest.raises(CalibrationError, match=r"is JSON, as of boxes(?s:.*)class folders"):
        labelled(tmp_path / "instances.json", PRE, 10)
