import json
import logging
import os
import shutil
import tarfile
import zipfile
from datetime import UTC, datetime
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from command_line import command
from fedunlearn.data import datasets
from fedunlearn.data.archives import entered, extract
from fedunlearn.data.images import ImageReader, Reading, class_name, find_images, read_image, say_passed_over
from fedunlearn.data.scaling import OutOfRangeError, UnreadableError, scaled
from fedunlearn.data.store import add_to_list
from fedunlearn.errors import UserError

RANDOM = np.random.default_rng(0)
COLOURED = RANDOM.integers(0, 256, (12, 20, 3), np.uint8)


def saved(folder, name, array, **options):
    Image.fromarray(array).save(folder / name, **options)
    return folder / name


def flat(value, dtype, shape=(8, 8)):
    return np.full(shape, value, dtype)


def old_way(path, size):
    """How images were read before there were kinds of them."""
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB").resize((size, size)))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp", "a.tif", "a.ppm", "a.gif", "a.jp2", "a.j2k"])
def test_plain_images_have_the_bits_they_always_had(tmp_path, name):
    path = saved(tmp_path, name, COLOURED)
    assert (read_image(path, 9) == old_way(path, 9)).all()


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("P", "a.png"), ("1", "a.png"), ("CMYK", "a.jpg")])
def test_grey_palette_and_cmyk_images_have_the_bits_they_always_had(tmp_path, mode, name):
    Image.fromarray(COLOURED).convert(mode).save(tmp_path / name)
    assert (read_image(tmp_path / name, 9) == old_way(tmp_path / name, 9)).all()


@pytest.mark.parametrize(
    ("name", "values", "grey"),
    [
        ("a.png", flat(20_000, np.uint16), 78),
        ("a.tif", flat(20_000, np.uint16), 78),
        ("a.pgm", flat(20_000, np.uint16), 78),
        ("a.tif", flat(20_000, np.int32), 78),
        ("a.png", flat(65_535, np.uint16), 255),
        ("a.tif", flat(0.5, np.float32), 128),
    ],
)
def test_images_of_many_bits_are_scaled_by_the_range_of_their_type(tmp_path, name, values, grey):
    assert (read_image(saved(tmp_path, name, values), 8) == grey).all()


def test_a_16_bit_image_looks_as_its_8_bit_twin(tmp_path):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4
    wide = saved(tmp_path, "wide.png", ramp * 257)
    narrow = saved(tmp_path, "narrow.png", ramp.astype(np.uint8))
    assert (read_image(wide, 8) == read_image(narrow, 8)).all()


def test_values_outside_the_range_are_refused_and_a_window_holds_them(tmp_path):
    path = saved(tmp_path, "ct.tif", np.array([[-1000.0, 400.0]] * 4, np.float32))
    with pytest.raises(OutOfRangeError, match=r"^its values -1000\.\.400 are not in 0\.\.1$"):
        read_image(path, 8)
    read = read_image(path, 2, window=(-1000, 400))
    assert (read[:, 0].max(), read[:, 1].min()) == (0, 255)
    reader = ImageReader(Reading(8), total=1)
    reader.read([path], 1)
    with pytest.raises(UserError, match=r"data\.window=\[-1000,400\] would hold all values"):
        reader.conclude()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int64, np.float32, bool])
def test_scaling_equals_a_loop_over_the_values(dtype):
    high = {np.uint16: 65_535, np.float32: 1, bool: 1}.get(dtype, 255)
    values = (RANDOM.random(50) * (high + (np.dtype(dtype).kind != "f"))).astype(dtype)
    naive = [int(255 * float(value) / high + 0.5) for value in values]
    assert np.abs(scaled(values) - np.array(naive, int)).max() <= (1 if dtype == np.float32 else 0)
    assert scaled(values).dtype == np.uint8


@pytest.mark.parametrize("values", [np.array([np.nan, 0.5]), np.array([np.inf]), np.array(["a"])])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(UnreadableError, match="number"):
        scaled(values)


def test_what_is_transparent_is_laid_on_white_and_what_is_opaque_stays(tmp_path):
    alpha = np.zeros((12, 20, 1), np.uint8)
    alpha[:, :10] = 255
    path = saved(tmp_path, "a.png", np.concatenate([COLOURED, alpha], axis=2))
    clear, opaque = (
        tmp_path / "clear.png",
        saved(tmp_path, "opaque.png", np.dstack([COLOURED, np.full_like(alpha, 255)])),
    )
    Image.open(path).crop((10, 0, 20, 12)).save(clear)
    assert (read_image(clear, 8) == 255).all()
    assert (read_image(opaque, 9) == old_way(opaque, 9)).all()


def test_exif_turns_only_if_asked_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    path = saved(tmp_path, "a.png", COLOURED, exif=exif)
    stored, turned = read_image(path, 9), read_image(path, 9, exif=True)
    assert (turned == np.asarray(Image.fromarray(COLOURED[::-1, ::-1]).resize((9, 9)))).all()
    assert (stored == old_way(path, 9)).all()
    reader = ImageReader(Reading(9), total=1)
    reader.read([path], 1)
    reader.conclude()
    assert "1 images are turned by EXIF alone" in caplog.text


@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0"])
def test_damaged_exif_data_turn_nothing(tmp_path, caplog, exif):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    path = saved(tmp_path, "a.webp", COLOURED, exif=exif, lossless=True)
    assert (read_image(path, 9, exif=True) == old_way(path, 9)).all()
    reader = ImageReader(Reading(9), total=1)
    reader.read([path], 1)
    reader.conclude()
    assert "EXIF" not in caplog.text


def test_an_image_of_which_padding_leaves_nothing_is_refused(tmp_path):
    path = saved(tmp_path, "a.png", np.full((3, 1000, 3), 200, np.uint8))
    with pytest.raises(UnreadableError, match=r"1000 x 3 pixels data\.fit=pad would leave nothing"):
        read_image(path, 8, fit="pad")
    assert (read_image(path, 8, fit="stretch") == 200).all()


def test_fit_stretches_crops_or_pads(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    path = saved(tmp_path, "a.png", wide)
    stretched, cropped, padded = (read_image(path, 8, fit=fit) for fit in ("stretch", "crop", "pad"))
    assert (cropped == 200).all()
    assert (padded[:2] == 0).all()
    assert padded[2:6, 3:5].min() > 190
    assert stretched[:, 3:5].min() > 190
    assert stretched[:, 0].max() < 50


def test_several_frames_are_refused(tmp_path):
    frames = [Image.fromarray(COLOURED), Image.fromarray(COLOURED[::-1])]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(UnreadableError, match="has 2 frames"):
        read_image(tmp_path / "a.tif", 8)


def bad_files(folder, count):
    good = saved(folder, "good.png", RANDOM.integers(0, 256, (60, 60, 3), np.uint8))
    bad = [folder / f"bad{i:02}.png" for i in range(count)]
    for path in bad:
        path.write_bytes(good.read_bytes()[:2000] if path.stem[-1] == "0" else b"no image")
    return good, bad


def test_all_unreadable_files_are_named_in_one_list(tmp_path):
    good, bad = bad_files(tmp_path, 23)
    reader = ImageReader(Reading(8), total=24)
    images, is_good = reader.read([good, *bad], 1 + len(bad))
    assert (len(images), is_good.tolist()) == (1, [True] + [False] * 23)
    with pytest.raises(UserError) as raised:
        reader.conclude()
    lines = str(raised.value).splitlines()
    assert lines[0] == "23 of 24 files are not readable images:"
    assert lines[1].startswith(f"  {bad[0]}: image file is truncated")
    assert lines[2] == f"  {bad[1]}: cannot identify image file"
    assert lines[21:] == ["  and 3 more", "data.skip_bad=true goes on without"]


def test_bad_files_are_left_out_if_asked(tmp_path, caplog):
    for name in "ab":
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(6):
            saved(tmp_path / "tree" / name, f"{i}.png", COLOURED)
    (tmp_path / "tree" / "a" / "0.png").write_bytes(b"no image")
    arguments = {"root": str(tmp_path / "tree"), "cache": tmp_path / "cache", "image_size": 8}
    data = datasets.load("folder", **arguments, choices=datasets.Choices(skip_bad=True))
    assert np.bincount(data.train.labels).tolist() == [4, 5]
    assert len(data.files) == 9
    assert "1 of 12 images are left out" in caplog.text
    with pytest.raises(UserError, match=r"0\.png is not a readable image"):
        datasets.load("folder", **arguments)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_which_nothing_can_be_read_is_named(tmp_path, split):
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "tree" / part / name).mkdir(parents=True)
            saved(tmp_path / "tree" / part / name, "0.png", COLOURED)
    for file in (tmp_path / "tree" / split).rglob("*.png"):
        file.write_bytes(b"no image")
    arguments = {"root": str(tmp_path / "tree"), "cache": tmp_path / "cache", "image_size": 8}
    with pytest.raises(UserError, match=f"tree has no example for {split}ing that can be read"):
        datasets.load("folder", **arguments, choices=datasets.Choices(skip_bad=True))
    assert not list((tmp_path / "cache").glob("folder-*"))


def test_resizing_and_progress_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    paths = [saved(tmp_path, f"{n}.png", np.zeros((n, 2 * n, 3), np.uint8)) for n in (6, 10, 30)]
    times = iter([0, 4, 11, 12])
    reader = ImageReader(Reading(8), total=3, clock=lambda: next(times))
    reader.read(paths, len(paths))
    reader.conclude()
    assert [record.getMessage() for record in caplog.records] == [
        "decoded 2 of 3 images",
        "3 images of 12 x 6 to 60 x 30 pixels become 8 x 8 (data.image_size, data.fit=stretch)",
    ]


def test_dark_16_bit_images_are_pointed_out(tmp_path, caplog):
    reader = ImageReader(Reading(8), total=1)
    reader.read([saved(tmp_path, "a.png", flat(4095, np.uint16))], 1)
    reader.conclude()
    assert "reach 4095 of 65535: data.window=[0,4095]" in caplog.text


@pytest.mark.parametrize("choice", [{"fit": "pad"}, {"exif": True}, {"window": (0.0, 4095.0)}, {"skip_bad": True}])
def test_another_choice_makes_another_copy_and_the_defaults_none(choice):
    assert datasets.Choices().key == []
    ((name, value),) = choice.items()
    assert datasets.Choices(**choice).key == [f"{name}={value!r}"]


def test_unreadable_images_end_a_run_before_anything_starts(home, tmp_path, monkeypatch, capsys):
    root = classes_of(tmp_path / "root", "a", "b")
    for name in ("a/0.png", "b/3.png"):
        (root / name).write_bytes(b"no image")
    monkeypatch.setattr("fedunlearn.apps.simulate._start_ray", lambda *about, **more: pytest.fail("Ray starts"))
    assert command("run", "digits", "data.name=folder", f"data.root={root}") == 2
    told = capsys.readouterr().err
    assert "2 of 12 files are not readable images:" in told
    assert all(f"{root / name}: cannot identify image file" in told for name in ("a/0.png", "b/3.png"))
    assert not (home / "runs").exists()


# finding -----------------------------------------------------------------------------------------------------------


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_images_are_found_in_order_and_the_rest_is_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    root = tree(
        tmp_path / ".x",
        *("b/2.PNG", "b/1.jpg", "a-b/1.png", "a/z/1.png", "a/9.tif", "a/Thumbs.db", "a/notes.txt", "a/README"),
        *(".ipynb_checkpoints/1.png", "__MACOSX/a/1.png", "a/._9.tif", "a/3.txt"),
    )
    found = find_images(root)
    assert [str(file) for file in found.files] == ["a/9.tif", "a/z/1.png", "a-b/1.png", "b/1.jpg", "b/2.PNG"]
    assert found.passed_over == {"hidden": 2, "__MACOSX": 1, "Thumbs.db": 1, ".txt": 2, "no ending": 1}
    say_passed_over(root, found.passed_over)
    assert caplog.records[-1].getMessage().endswith(": 2 .txt, 1 Thumbs.db, 1 __MACOSX, 2 hidden, 1 no ending")


def test_links_are_followed_loops_are_not(tmp_path):
    root = tree(tmp_path / "root", *(f"a/{i}.png" for i in range(3)))
    tree(tmp_path / "elsewhere", "1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    (root / "a" / "itself").symlink_to(root / "a" / "itself")
    os.mkfifo(root / "a" / "pipe.png")
    found = find_images(root)
    assert [str(file) for file in found.files] == ["a/0.png", "a/1.png", "a/2.png", "b/1.png"]
    assert found.passed_over == {"loop of links": 1, "dangling link": 2, "neither file nor folder": 1}


def test_changing_what_a_link_leads_to_changes_the_name_of_the_copy(tmp_path):
    for name in "ab":
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(6):
            saved(tmp_path / "real" / name, f"{i}.png", COLOURED)
    (tmp_path / "root").mkdir()
    for name in "ab":
        (tmp_path / "root" / name).symlink_to(tmp_path / "real" / name)
    before = datasets.load("folder", root=str(tmp_path / "root"), cache=tmp_path / "cache", image_size=8)
    saved(tmp_path / "real" / "a", "0.png", COLOURED[::-1, :10])
    after = datasets.load("folder", root=str(tmp_path / "root"), cache=tmp_path / "cache", image_size=8)
    assert before.fingerprint != after.fingerprint


def test_an_archive_made_on_a_mac_has_the_classes_in_its_one_folder(tmp_path, monkeypatch):
    classes_of(tmp_path / "pictures", "a", "b")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in sorted((tmp_path / "pictures").rglob("*.png")):
            inside = file.relative_to(tmp_path)
            archive.write(file, inside)
            archive.writestr(f"__MACOSX/{inside.parent}/._{file.name}", b"not an image")
    data = load(tmp_path / "pictures.zip", tmp_path)
    assert data.class_names == ["a", "b"]
    assert np.bincount(data.train.labels).tolist() == [5, 5]
    monkeypatch.setattr(datasets, "extract", lambda *paths: pytest.fail("unpacked again"))
    assert load(tmp_path / "pictures.zip", tmp_path).fingerprint == data.fingerprint


def test_names_in_two_spellings_are_one_class():
    assert class_name("Le\u0301sion") == class_name("L\u00e9sion")
    assert class_name("猫 $x$, a=b\n") == "猫 $x$, a=b\n"
    class_name(os.fsdecode(b"caf\xe9")).encode()  # raises where a report could not be written


# archives ----------------------------------------------------------------------------------------------------------


def zipped(path, names, *, system=3):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.create_system = system
            archive.writestr(entry, b"x")
    return path


def unpacked(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_names_of_any_script_survive_in_a_zip(tmp_path):
    zipped(tmp_path / "a.zip", ["猫/1.png", "caf\u00e9/2.png", "$a, b=c/3.png"])
    extract(tmp_path / "a.zip", tmp_path / "out")
    assert unpacked(tmp_path / "out") == ["$a, b=c/3.png", "caf\u00e9/2.png", "猫/1.png"]


def test_utf_8_that_a_zip_does_not_declare_is_read_as_such(tmp_path):
    path = zipped(tmp_path / "a.zip", ["猫.png"])
    path.write_bytes(path.read_bytes().replace(b"\x00\x08\x00\x00", b"\x00\x00\x00\x00"))
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() != ["猫.png"]
    extract(path, tmp_path / "out")
    assert unpacked(tmp_path / "out") == ["猫.png"]


def test_backslashes_of_windows_are_folders(tmp_path):
    extract(zipped(tmp_path / "a.zip", ["a\\1.png"], system=0), tmp_path / "out")
    assert unpacked(tmp_path / "out") == ["a/1.png"]


def tarred(path, *members, mode="w:gz"):
    """A tar archive of members, each a name, or a name with its type and what it links to."""
    with tarfile.open(path, mode) as archive:
        for name, kind, target in (member if isinstance(member, tuple) else (member, b"0", "") for member in members):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mtime, entry.mode = kind, target, 1_000_000_000, 0o4777
            entry.size = len(name) if kind == b"0" else 0
            archive.addfile(entry, BytesIO(name.encode()))
    return path


@pytest.fixture(params=[True, False], ids=["filters", "3.11.2"])
def tar_of_any_python(request, monkeypatch):
    """Python 3.11.0 to 3.11.3 have no filters of tar archives."""
    if not request.param:
        for name in [name for name in vars(tarfile) if name.endswith(("FilterError", "_filter"))]:
            monkeypatch.delattr(tarfile, name)
        monkeypatch.delattr(tarfile.TarFile, "extractall")


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/evil.png", "..", "/"])
def test_paths_that_lead_out_of_an_archive_are_refused(tmp_path, tar_of_any_python, name):
    (tmp_path / "out").mkdir()
    for archive in (tarred(tmp_path / "a.tar", name), *([zipped(tmp_path / "a.zip", [name])] if len(name) > 2 else [])):
        with pytest.raises(UserError, match=f"{archive.name} is refused: {name} would lie outside its folder"):
            extract(archive, tmp_path / "out")
    with pytest.raises(UserError, match=r"is refused: /C:/evil.png would"):
        extract(zipped(tmp_path / "b.zip", ["C:\\evil.png"], system=0), tmp_path / "out")
    assert not unpacked(tmp_path / "out")
    assert not [*tmp_path.rglob("evil.png"), *tmp_path.parent.glob("evil.png")]


def test_only_files_come_out_of_an_archive(tmp_path, tar_of_any_python, caplog):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    (tmp_path / "out").mkdir()
    odd = [("link", b"2", "/etc/passwd"), ("up", b"2", ".."), ("disk", b"4", ""), ("pipe", b"6", "")]
    extract(
        tarred(tmp_path / "a.tar", "./a/1.png", *odd, ("up/2.png", b"0", ""), ("a/3.png", b"1", "./a/1.png")),
        tmp_path / "out",
    )
    assert unpacked(tmp_path / "out") == ["a/1.png", "a/3.png", "up/2.png"]
    assert [(tmp_path / "out" / name).read_text() for name in ("a/1.png", "a/3.png")] == ["./a/1.png"] * 2
    assert not (tmp_path / "up").is_symlink()
    assert (tmp_path / "out" / "a" / "1.png").stat().st_mtime == 1_000_000_000
    assert not (tmp_path / "out" / "a" / "1.png").stat().st_mode & 0o4000
    assert [record.getMessage() for record in caplog.records] == [
        f"passed over in {tmp_path / 'a.tar'}: 4 links and devices"
    ]
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    (tmp_path / "none").mkdir()
    extract(tmp_path / "a.zip", tmp_path / "none")
    assert not unpacked(tmp_path / "none")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        lambda file: file.write_bytes(b"\x1f\x8b" + bytes(99)),
        lambda file: file.write_bytes(b"PK\x03\x04" + bytes(99)),
        lambda file: file.write_bytes(b""),
        lambda file: tarred(file, ("a.png", b"1", "gone.png")),
        lambda file: tarred(file, "a", "a/1.png"),
        lambda file: tarred(file, ("a", b"4", ""), ("b", b"1", "a")),
    ],
    ids=["cut", "gzip", "zip", "empty", "link to nothing", "folder and file", "link to a device"],
)
def test_an_archive_that_cannot_be_read_is_one_line(tmp_path, tar_of_any_python, spoil):
    file = tarred(tmp_path / "a.tar.gz", *(f"{n}.png" for n in range(99)))
    spoil(file)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"a.tar.gz is no folder and no readable archive \(.+\)$"):
        extract(file, tmp_path / "out")


def test_unpacking_again_gives_the_same_times_and_a_date_that_is_none_does_no_harm(tmp_path):
    path = zipped(tmp_path / "a.zip", ["1.png"])
    for out in (tmp_path / "first", tmp_path / "second"):
        extract(path, out)
    first, second = ((tmp_path / out / "1.png").stat().st_mtime_ns for out in ("first", "second"))
    assert first == second
    with zipfile.ZipFile(path) as archive:
        entry = archive.infolist()[0]
    assert first == int(datetime(*entry.date_time, tzinfo=UTC).timestamp()) * 10**9
    content = bytearray(path.read_bytes())
    for start in (content.index(b"PK\x03\x04") + 10, content.index(b"PK\x01\x02") + 12):
        content[start : start + 4] = bytes(4)
    path.write_bytes(content)
    extract(path, tmp_path / "third")
    assert unpacked(tmp_path / "third") == ["1.png"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("top/a/1.png", "top/b/1.png", "__MACOSX/top/a/1.png", "README.txt"), "top"),
        (("x/y/a/1.png", "x/y/b/1.png"), "x/y"),
        (("a/1.png", "b/1.png"), "."),
        (("only/1.png",), "."),
        (("top/1.png", "top/a/1.png"), "top"),
        (("1.png", "top/a/1.png"), "."),
    ],
)
def test_a_folder_around_the_whole_is_entered(tmp_path, names, expected):
    assert entered(tree(tmp_path, *names)) == tmp_path / expected


# DICOM -------------------------------------------------------------------------------------------------------------


def dicom(path, pixels, **tags):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = CTImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = generate_uid()
    image.Rows, image.Columns = pixels.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    for name, value in tags.items():
        setattr(image, name, value)
    image.PixelData = pixels.astype(np.uint16).tobytes()
    image.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("tags", "window", "expected"),
    [
        ({}, (), [0, 128, 255]),  # of 0..4095
        ({"PhotometricInterpretation": "MONOCHROME1"}, (), [255, 127, 0]),
        ({"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 1024, "WindowWidth": 2049}, (), [0, 128, 255]),
        (
            {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [3072, 1], "WindowWidth": [1, 9]},
            (),
            [0, 128, 255],
        ),
        ({"RescaleSlope": 1, "RescaleIntercept": -1024}, (-1024, 1024), [0, 255, 255]),
    ],
    ids=["range", "inverted", "window", "no width", "window of the setting"],
)
def test_dicom_is_read_as_a_radiologist_sees_it(tmp_path, tags, window, expected):
    path = dicom(tmp_path / "1.2.840.1", np.array([[0, 2048, 4095]]), **tags)
    assert [str(file) for file in find_images(tmp_path).files] == ["1.2.840.1"]
    image = read_image(path, 3, window=window)
    assert image[1, :, 0].tolist() == expected


def test_dicom_of_several_frames_is_refused(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 4)), NumberOfFrames=2)
    with pytest.raises(UnreadableError, match="has 2 frames"):
        read_image(path, 4)


def test_without_pydicom_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 4)))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(UserError, match=r"pip install 'fedunlearn\[dicom\]'"):
        read_image(path, 4)


# folders of classes ------------------------------------------------------------------------------------------------


def classes_of(root, *names, per_class=6):
    for name in names:
        for i in range(per_class):
            (root / name).mkdir(parents=True, exist_ok=True)
            saved(root / name, f"{i}.png", COLOURED)
    return root


def load(root, tmp_path, **options):
    return datasets.load("folder", root=str(root), cache=tmp_path / "cache", image_size=8, **options)


@pytest.mark.parametrize(
    ("splits", "left_out"),
    [
        (("Train", "Test"), None),
        (("training", "testing"), None),
        (("train", "val"), None),
        (("train", "test", "val"), "val"),
        (("around/train", "around/test"), None),
    ],
)
def test_splits_are_found_whatever_they_are_called(tmp_path, caplog, splits, left_out):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    root = tmp_path / "root"
    for place, split in enumerate(splits):
        classes_of(root, f"{split}/a", f"{split}/b", per_class=2 + place)
    data = load(root, tmp_path)
    assert (data.class_names, len(data.train.labels), len(data.test.labels)) == (["a", "b"], 4, 6)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said == ([f"left out of {root}: {left_out}"] if left_out else [])


def test_what_is_beside_classes_is_passed_over_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    root = classes_of(tmp_path / "root", "a", "b", "__MACOSX/a", ".ipynb_checkpoints")
    (root / "a" / "notes.txt").write_text("x")
    assert load(root, tmp_path).class_names == ["a", "b"]
    assert f"passed over in {root}: 1 .txt, 1 __MACOSX, 1 hidden" in caplog.text


def test_an_empty_class_folder_is_said_and_passed_over(tmp_path, caplog):
    root = classes_of(tmp_path / "root", "a", "b")
    (root / "apple").mkdir()
    assert load(root, tmp_path).class_names == ["a", "b"]
    assert f"passed over in {root}: no image in apple" in caplog.text
    for name in "ab":
        shutil.rmtree(root / name)
        (root / name).mkdir()
    with pytest.raises(UserError, match=r"no folder of one subfolder of images a class \(no image in a, apple, b\)"):
        load(root, tmp_path)


def test_a_class_may_lack_test_images_where_its_folder_says_so(tmp_path, caplog):
    root = classes_of(tmp_path / "root", "train/a", "train/b", "train/c", "test/a", "test/b")
    (root / "test" / "c").mkdir()
    (root / "train" / "d").mkdir()
    data = load(root, tmp_path)
    assert (data.class_names, sorted({*data.test.labels.tolist()})) == (["a", "b", "c"], [0, 1])
    assert "test: no image in c" in caplog.text


def test_another_class_in_the_test_split_is_named(tmp_path):
    other = classes_of(tmp_path / "other", "train/a", "train/b", "test/a", "test/c")
    with pytest.raises(UserError, match="train and test have different classes: b"):
        load(other, tmp_path)
    (other / "test" / "b").mkdir()
    (other / "train" / "c").mkdir()  # so that nobody could learn it
    with pytest.raises(UserError, match="train and test have different classes: c"):
        load(other, tmp_path)


@pytest.mark.parametrize(
    ("names", "where"), [(("train", "test"), "train/CLASS"), (("Training", "val"), "Training/CLASS")]
)
def test_images_directly_in_splits_are_told_where_they_belong(tmp_path, names, where):
    root = classes_of(tmp_path / "root", *names)
    with pytest.raises(UserError, match=rf"{names[0]} is no folder .* \(6 images lie directly in it: {where}/image"):
        load(root, tmp_path)


def test_images_without_a_class_folder_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedunlearn")
    root = classes_of(tmp_path / "flat", "images")
    with pytest.raises(UserError, match=r"\(6 images lie directly in it: CLASS/image is read\)"):
        load(root / "images", tmp_path)
    beside = classes_of(tmp_path / "beside", "a", "b")
    shutil.copy(next((beside / "a").iterdir()), beside / "x.png")
    assert len(load(beside, tmp_path).train.labels) == 10
    assert "1 image in no folder of a class" in caplog.text


def test_a_folder_that_may_be_a_split_is_said_to_be_a_class(tmp_path, caplog):
    root = classes_of(tmp_path / "root", "Train", "Dog")
    assert load(root, tmp_path).class_names == ["Dog", "Train"]
    assert "Train is taken for a class called Train" in caplog.text


def test_class_names_of_any_kind_survive_the_store(tmp_path):
    names = sorted(["$\\frac$", "a=b, c", "line\nbreak", "猫<b>&\"'", " blank"])
    root = classes_of(tmp_path / "my data, x=1", *names)
    data = load(root, tmp_path)
    assert data.class_names == names
    assert np.bincount(data.train.labels).tolist() == [5] * 5


def test_files_of_any_name_are_listed_for_removal_until_they_are_gone(tmp_path):
    names = ["a.png", "line\nbreak.png", os.fsdecode(b"caf\xe9.png"), "猫.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    paths = [str(tmp_path / name) for name in names]
    listed = tmp_path / "list.txt"
    add_to_list(listed, paths[:2])
    add_to_list(listed, [*paths[1:], "/no/such"])
    assert listed.read_text() == "".join(
        f"{path if path in (paths[0], paths[3]) else json.dumps(path)}\n" for path in paths
    )
    for path in paths[1:]:
        os.unlink(path)
    add_to_list(listed, [])
    assert listed.read_text() == f"{paths[0]}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_is_not_the_fault_of_the_archive(tmp_path):
    zipped(tmp_path / "a.zip", ["a/1.png"])
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "1.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        extract(tmp_path / "a.zip", tmp_path / "out")
