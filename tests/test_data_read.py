"Reading: every format, every bad input, and no torch"
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from anomnb.core.errors import AnomnbError, AnomnbFileError
from anomnb.data import masks, read


def picture(h=37, w=53, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, channels) if channels > 1 else (h, w), dtype=np.uint8)


@pytest.fixture
def png(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "part.png")
    return tmp_path / "part.png"


@pytest.mark.parametrize("suffix,args", [("png", {}), ("bmp", {}), ("tif", {}), ("tiff", dict(compression="tiff_lzw")),
                                         ("webp", dict(lossless=True))])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_round_trip(tmp_path, suffix, args, channels):
    a = picture(channels=channels)
    Image.fromarray(a).save(tmp_path / f"a.{suffix}", **args)
    got = read.read_image(tmp_path / f"a.{suffix}")
    want = a if channels == 3 else np.repeat(a[..., None], 3, -1)
    assert got.dtype == np.uint8 and got.flags.writeable
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(read.read_image((tmp_path / f"a.{suffix}").read_bytes()), want)
    assert read.image_size(tmp_path / f"a.{suffix}") == a.shape[:2]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_decoded_in_full(tmp_path, channels):
    Image.fromarray(picture(channels=channels)).save(tmp_path / "a.jpg", quality=90)
    np.testing.assert_array_equal(read.read_image(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / f"a.{suffix}", exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}")).convert("RGB"))
    np.testing.assert_array_equal(read.read_image(tmp_path / f"a.{suffix}"), want)
    assert want.shape == ((53, 37, 3) if orientation >= 5 else (37, 53, 3))
    if suffix == "jpg":
        assert read.image_size(tmp_path / "a.jpg") == want.shape[:2]


def test_alpha_is_dropped_and_colours_kept(tmp_path):
    rgba = picture(channels=4)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read.read_image(tmp_path / "rgba.png"), rgba[..., :3])
    palette = Image.fromarray(picture()).quantize(16)
    palette.save(tmp_path / "p.png", transparency=bytes(range(0, 160, 10)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read.read_image(tmp_path / "p.png")
    np.testing.assert_array_equal(got, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    im = Image.fromarray(picture()).convert(mode)
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    im.save(tmp_path / f"a.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read.read_image(tmp_path / f"a.{suffix}")
    assert got.shape == (37, 53, 3) and got.dtype == np.uint8


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, depth, colour, rows):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_are_refused_even_where_pillow_drops_them(tmp_path):
    grey = (picture(channels=1).astype(np.uint16) * 257)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    (tmp_path / "rgb.png").write_bytes(png_of(2, 2, 16, 2, (b"\0" + bytes(12)) * 2))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name in ("grey.png", "grey.tif", "rgb.png", "float.tif"):
        with pytest.raises(AnomnbError, match=f"{name}.*8 bits a channel.*scale the values"):
            read.read_image(tmp_path / name)


def test_missing_file_offers_near_names(png):
    with pytest.raises(AnomnbFileError, match=r"no file .*prat.png.*did you mean .*part.png"):
        read.read_image(png.with_name("prat.png"))
    with pytest.raises(FileNotFoundError, match="no folder .* either"):
        read.read_image(png.parent / "nowhere" / "x.png")


def test_folder_as_image(tmp_path):
    with pytest.raises(AnomnbFileError, match="can't open"):
        read.read_image(tmp_path)


def test_zero_bytes(tmp_path):
    (tmp_path / "none.jpg").write_bytes(b"")
    with pytest.raises(AnomnbError, match=r"none.jpg.*is empty \(0 bytes\)"):
        read.read_image(tmp_path / "none.jpg")


def test_text_named_png(tmp_path):
    (tmp_path / "words.png").write_text("these are words")
    with pytest.raises(AnomnbError, match=r"words.png.*is no JPEG, PNG.*begins with b'these ar'"):
        read.read_image(tmp_path / "words.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(tmp_path, suffix, share):
    Image.fromarray(picture(120, 160)).save(tmp_path / f"cut.{suffix}")
    whole = (tmp_path / f"cut.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[:max(20, int(len(whole) * share))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow remarks on short TIFF directories
        with pytest.raises(AnomnbError, match=rf"cut.{suffix}.*(cut short|broken header).*copy it again"):
            read.read_image(tmp_path / f"cut.{suffix}")


def test_noise_in_a_file_is_named_or_read(png):
    "A file with random bytes changed gives an image of its size or a named error, nothing else"
    whole, g = png.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for at in g.integers(8, len(data), 4):
            data[at] = g.integers(256)
        try:
            assert read.read_image(bytes(data)).ndim == 3
        except AnomnbError as e:
            assert "bytes" in str(e)


@pytest.mark.parametrize("header_only", [False, True])
def test_huge_header_is_refused_before_decoding(tmp_path, header_only):
    data = png_of(30_000, 30_000, 8, 2, b"")
    (tmp_path / "huge.png").write_bytes(data[:33] if header_only else data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (read.read_image, read.image_size, masks.read_mask):
            with pytest.raises(AnomnbError, match=r"huge.png.*30000×30000 pixels"):
                call(tmp_path / "huge.png")


def test_large_but_allowed_header_gives_no_warning(tmp_path):
    (tmp_path / "large.png").write_bytes(png_of(12_000, 12_000, 8, 0, b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read.image_size(tmp_path / "large.png") == (12_000, 12_000)


def test_threads_read_alike(png):
    with ThreadPoolExecutor(8) as pool:
        for a in pool.map(read.read_image, [png] * 64):
            np.testing.assert_array_equal(a, picture())


@pytest.mark.parametrize("a,words", [
    (np.full((4, 4, 3), np.nan), "NaN or infinite"),
    (np.full((4, 4, 3), np.inf, np.float32), "NaN or infinite"),
    (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
    (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\).*channels last"),
    (np.zeros((4,), np.uint8), "shape"),
    (np.zeros((0, 4), np.uint8), "shape"),
    (np.zeros((4, 4), np.int64), "dtype int64"),
    (np.zeros((4, 4), bool), "dtype bool"),
    (np.zeros((4, 4), np.uint16), "dtype uint16"),
    (np.zeros((4, 4), complex), "dtype complex128"),
    (np.full((4, 4), 1.5), r"from 1.5 to 1.5.*\[0, 1\]"),
    (np.full((4, 4), -0.1), r"\[0, 1\]"),
])
def test_bad_arrays(a, words):
    with pytest.raises(AnomnbError, match=words):
        read.open_source(a)
    items = read.open_source([picture(), a])  # among others it is an item that raises when it is read
    with pytest.raises(AnomnbError, match=words):
        items[1].read()
    with pytest.raises(AnomnbError, match="array 1"):
        items[1].read()


def test_bad_tensors():
    torch = pytest.importorskip("torch")
    for x, words in ((torch.zeros(4, 5, 3), "channels first"), (torch.full((3, 4, 4), float("nan")), "NaN"),
                     (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"), (torch.zeros(1, 2, 3, 4, 5), "shape")):
        with pytest.raises(AnomnbError, match=words):
            read.open_source(x)
    assert read.check_array(torch.rand(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)).shape == (4, 5, 3)


def test_all_sources_of_the_same_pixels_agree(png):
    torch = pytest.importorskip("torch")
    a = picture()
    chw = torch.from_numpy(a).permute(2, 0, 1)
    sources = [png, str(png), png.read_bytes(), Image.open(png), a, a / 255, (a / 255).astype(np.float32),
               chw, chw.float() / 255, chw.double() / 255]
    want = a.transpose(2, 0, 1) / np.float32(255)
    for s in sources:
        got = read.to_unit(read.open_source(s)[0].read())
        assert got.dtype == np.float32 and got.flags.c_contiguous
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("source,words", [
    (7, "int is no source"), (None, "NoneType is no source"), ({"a": 1}, "dict is no source"), ([], "empty"),
    ([np.zeros((4, 4), np.uint8), 7], "position 1 .* int '7'"), ([[np.zeros((4, 4))]], "position 0 .* list"),
    ([np.zeros((4, 4), np.uint8), None], "position 1"), ("nowhere.png", "no file or folder 'nowhere.png'"),
    ("nowhere/*.png", "no image matches"),
])
def test_bad_sources(source, words):
    with pytest.raises(AnomnbError, match=words):
        read.open_source(source)


def test_bad_file_in_a_list_raises_only_when_read(png):
    items = read.open_source([png, png.with_name("gone.png")])
    assert [o.index for o in items] == [0, 1]
    items[0].read()
    with pytest.raises(AnomnbFileError, match="gone.png"):
        items[1].read()


def test_batches_and_lists_are_numbered(png):
    batch = np.stack([picture(seed=i) for i in range(3)])
    items = read.open_source([png, batch, png.parent])
    assert [o.index for o in items] == list(range(5))
    assert [o.source for o in items[1:4]] == ["array 1[0]", "array 1[1]", "array 1[2]"]
    np.testing.assert_array_equal(items[2].read(), batch[1])


def test_listing(tmp_path):
    for name in ("b/10.png", "b/2.PNG", "b/.2.png", ".git/x.png", "a.jpeg", "ground_truth/m.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [o.relative_to(tmp_path).as_posix() for o in read.list_images(tmp_path)]
    assert found == ["a.jpeg", "b/2.PNG", "b/10.png", "ground_truth/m.png"]
    assert len(read.open_source(tmp_path)) == 3
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert len(read.list_images(tmp_path)) == 4
    with pytest.raises(AnomnbFileError, match="no image in .*x.git"):
        read.list_images(_empty(tmp_path / "x.git"))
    with pytest.raises(AnomnbFileError, match="no folder"):
        read.list_images(tmp_path / "c")
    with pytest.raises(AnomnbFileError, match="is a file"):
        read.list_images(tmp_path / "a.jpeg")


def _empty(folder):
    folder.mkdir()
    return folder


def flood(marked):
    "Naive 8-connected labels: join neighbours until nothing changes"
    ids = np.where(marked, np.arange(1, marked.size + 1).reshape(marked.shape), 0)
    while True:
        pad, before = np.pad(ids, 1), ids
        near = np.max([pad[1 + dy:pad.shape[0] - 1 + dy, 1 + dx:pad.shape[1] - 1 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)
        ids = np.where(marked, near, 0)
        if (ids == before).all():
            return ids


@pytest.mark.parametrize("seed", range(5))
def test_regions_against_flooding(tmp_path, seed):
    marked = np.random.default_rng(seed).random((20, 30)) < 0.35
    Image.fromarray(marked.astype(np.uint8) * (255 if seed % 2 else 1)).save(tmp_path / "m.png")
    got, want = masks.read_mask(tmp_path / "m.png", (20, 30)), flood(marked)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got > 0, marked)
    pairs = {(a, b) for a, b in zip(got[marked].tolist(), want[marked].tolist())}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == got.max()


def test_masks(tmp_path):
    spot = np.zeros((40, 40), np.uint8)
    spot[10:20, 10:20] = 255
    Image.fromarray(spot).save(tmp_path / "m.jpg", quality=60)
    np.testing.assert_array_equal(masks.read_mask(tmp_path / "m.jpg"), spot > 0)
    Image.fromarray(spot // 255).save(tmp_path / "faint.jpg", quality=100)
    with pytest.raises(AnomnbError, match="faint.jpg.*save it as PNG"):
        masks.read_mask(tmp_path / "faint.jpg")
    Image.fromarray(spot.astype(np.uint16) * 100).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(masks.read_mask(tmp_path / "deep.png"), spot > 0)
    with pytest.raises(AnomnbError, match=r"m.jpg.* is 40×40 .*'part.png' is 40×41"):
        masks.read_mask(tmp_path / "m.jpg", (40, 41), "part.png")
    with pytest.raises(AnomnbError, match="is a good image, but its mask"):
        read.Item("ok.png", image=spot, label=0, mask_path=tmp_path / "m.jpg").mask((40, 40))


def test_hash_depends_on_pixels_shape_and_dtype_alone(png):
    a = picture()
    assert read.content_hash(read.read_image(png)) == read.content_hash(a) == read.content_hash(np.asfortranarray(a))
    others = [a[::-1], a.reshape(53, 37, 3), a[:-1], (a / 255).astype(np.float32)]
    assert len({read.content_hash(o) for o in [a, *others]}) == 5


def test_reads_without_torch(png):
    code = ("import sys; sys.modules['torch'] = None\n"
            "from anomnb.data.read import open_source, to_unit\n"
            f"print(to_unit(open_source({str(png)!r})[0].read()).shape)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "(3, 37, 53)" in run.stdout, run.stderr
