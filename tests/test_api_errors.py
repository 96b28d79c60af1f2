"""Does every public function answer every kind of wrong argument with an error of ours that names the argument?"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from PIL import Image

import hpcmref
from hpcmref.codec import Codec
from hpcmref.errors import ArgumentTypeError, ConfigError, HpcmrefError, ImageError

GOOD = Image.new("RGB", (8, 8), "teal")


class Hostile:
    """Fails at whatever it is asked for."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("no")


class TextFile:
    def read(self) -> str:
        return "text"


def closed_file() -> Any:
    file = (DATA / "sample.png").open("rb")
    file.close()
    return file


def closed_image() -> Image.Image:
    image = GOOD.copy()
    image.close()
    return image


def truncated_image() -> Image.Image:
    """Opened, and not decoded yet."""
    return Image.open(io.BytesIO((DATA / "sample.png").read_bytes()[:20_000]))


def text_file() -> Any:
    """Opened in text mode, with bytes that are not UTF-8."""
    return io.TextIOWrapper(io.BytesIO(b"\x89HPC"), "utf-8")


def file_at_its_end() -> io.BytesIO:
    file = io.BytesIO((DATA / "sample.png").read_bytes())
    file.read()
    return file


def lazy_eps() -> Image.Image:
    eps = io.BytesIO()
    GOOD.save(eps, "EPS")
    return Image.open(io.BytesIO(eps.getvalue()))


def nested_tensor() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)])


# Argument -> what it may not be. The functions make each value anew, since some can be used only once.
KINDS: dict[str, list[Callable[[], Any]]] = {
    "image": [
        lambda: None, lambda: 42, lambda: 3.5, list, dict, lambda: object(), Hostile, lambda: [GOOD], lambda: Image,
    ],
    "image in bytes": [
        bytes, bytearray, lambda: b"no image", lambda: (DATA / "sample.png").read_bytes()[:20_000],
        lambda: memoryview(b""), io.BytesIO, closed_file, TextFile, lambda: io.StringIO("text"),
        lambda: "", lambda: "nowhere.png", lambda: "a\0b.png", lambda: Path("nowhere.png"), lambda: DATA,
        text_file, file_at_its_end,
    ],
    "image of Pillow": [
        closed_image, truncated_image, lazy_eps, lambda: Image.new("RGB", (0, 5)), lambda: Image.new("L", (40_000, 1)),
        lambda: Image.fromarray(np.full((2, 2), np.nan, np.float32)),
    ],
    "image in an array": [
        lambda: np.zeros(0), lambda: np.zeros((0, 3, 3), np.uint8), lambda: np.zeros((3, 3, 7), np.uint8),
        lambda: np.zeros((1, 2, 3, 3), np.uint8), lambda: np.zeros((4, 4), np.int64), lambda: np.zeros((4, 4), complex),
        lambda: np.full((4, 4), 2.0), lambda: np.full((4, 4), np.nan), lambda: np.array([["a"]]),
        lambda: np.array([[None]]), lambda: np.array(5),
    ],
    "image in a tensor": [
        lambda: torch.zeros(3, 0, 3), lambda: torch.zeros(5, 4, 4), lambda: torch.zeros(1, 3, 4, 4),
        lambda: torch.zeros(4, 4), lambda: torch.full((3, 4, 4), 9.0), lambda: torch.zeros(3, 4, 4, dtype=torch.int64),
        lambda: torch.zeros(3, 4, 4, dtype=torch.complex64), lambda: torch.zeros(3, 4, 4).to_sparse(),
        lambda: torch.zeros(3, 4, 4, device="meta"), lambda: torch.zeros(3, 4, 4).to_sparse_csr(),
        lambda: torch.zeros(3, 4, 4).to_mkldnn(), nested_tensor,
    ],
    "file": [
        lambda: None, lambda: 42, list, lambda: object(), Hostile, lambda: GOOD, bytes, lambda: b"no file",
        lambda: b"\x89HPC", lambda: b"\x89HPC\2", lambda: io.BytesIO(b""), closed_file, TextFile, lambda: "",
        lambda: "nowhere.bin", lambda: "a\0b", lambda: DATA, text_file, file_at_its_end,
    ],
    "quality": [lambda: 31.5, lambda: "high", lambda: -1, lambda: 64, lambda: 10**30, lambda: True, lambda: [3],
                lambda: float("nan"), lambda: np.array([1, 2]), lambda: torch.ones(2), Hostile],
    "size": [lambda: 0, lambda: -5, lambda: "40kB", lambda: 1.5, lambda: True, lambda: (1,)],
    "bpp": [lambda: 0, lambda: -1, lambda: float("nan"), lambda: float("inf"), lambda: "1", lambda: True, list,
            lambda: 10**400],
    "psnr": [lambda: 0, lambda: -1, lambda: float("nan"), lambda: float("inf"), lambda: "30", lambda: 1j, list,
             lambda: 10**400, lambda: -(10**400), lambda: 10**5000],
    "model": [lambda: 42, lambda: b"nano", list, lambda: "nowhere", lambda: "", lambda: DATA, lambda: "a\0b",
              lambda: DATA / "sample.png", Hostile],
    "device": [lambda: None, lambda: 0, lambda: "tpu", lambda: "", lambda: torch.device("cpu"), list],
    "flag": [lambda: None, lambda: 1, lambda: "yes", list],
    "strip": [lambda: None, lambda: 1, lambda: "all", lambda: ["exif", 3], lambda: [[]], lambda: b"exif"],
    "max_pixels": [lambda: 0, lambda: -1, lambda: 1.5, lambda: "many", lambda: None],
    "upto": [lambda: 0, lambda: 4, lambda: 2.5, lambda: None, lambda: "2"],
    "jobs": [lambda: 0, lambda: -1, lambda: 1.5, lambda: "2", lambda: None, lambda: True],
    "effort": [lambda: -1, lambda: 10, lambda: True, lambda: 1.5, lambda: "fast", lambda: None],
    "metric": [lambda: None, lambda: 1, lambda: "psnr", lambda: "ms-ssim"],
    "max_seconds": [lambda: 0, lambda: -1, lambda: "60", lambda: True, lambda: float("nan"), lambda: 60],
    "progress": [lambda: 42, lambda: "print"],
    "sources": [lambda: None, lambda: 42, lambda: "photo.png", lambda: b"bytes", lambda: GOOD, lambda: Path("x"),
                io.BytesIO, lambda: object()],
}  # fmt: skip
IMAGES = [name for name in KINDS if name.startswith("image")]
ENCODING = {
    "quality": ["quality"], "size": ["size"], "bpp": ["bpp"], "psnr": ["psnr"], "model": ["model"],
    "device": ["device"], "lossless": ["flag"], "keep_invisible": ["flag"], "strip": ["strip"], "verify": ["flag"],
    "effort": ["effort"], "metric": ["metric"], "max_seconds": ["max_seconds"],
}  # fmt: skip
DECODING = {
    "device": ["device"], "model": ["model"], "max_pixels": ["max_pixels"], "as_array": ["flag"], "upto": ["upto"],
    "partial": ["flag"], "damaged": ["flag"],
}  # fmt: skip
MANY = {"jobs": ["jobs"], "progress": ["progress"]}
PILLOW = ["image", "image of Pillow", "image in an array"]
TARGETS = {"size": ["size"], "bpp": ["bpp"], "psnr": ["psnr"]}
FLAGS = {"verify": ["flag"], "keep_invisible": ["flag"]}


def encode_one_of_many(image: Any = GOOD) -> list[bytes]:
    return list(hpcmref.encode_many([image], device="cpu"))


def decode_one_of_many(data: Any) -> list[Image.Image]:
    return list(hpcmref.decode_many([data], device="cpu"))


# Function -> what else it must be given, argument -> kinds of wrong values.
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[str]]]] = {
    "encode": (hpcmref.encode, {"image": GOOD}, {"image": IMAGES, **ENCODING}),
    "encode lossless": (hpcmref.encode, {"image": GOOD, "lossless": True}, {"image": IMAGES}),
    "decode": (hpcmref.decode, {"data": b""}, {"data": ["file"], **DECODING}),
    "info": (hpcmref.info, {}, {"data": ["file"]}),
    "load": (hpcmref.load, {}, {"model": ["model"], "device": ["device"]}),
    "encode_many": (hpcmref.encode_many, {"images": [GOOD]}, {"images": ["sources"], **ENCODING, **MANY}),
    "encode_many, image": (encode_one_of_many, {}, {"image": IMAGES}),
    "decode_many": (hpcmref.decode_many, {"files": [b""]}, {"files": ["sources"], **DECODING, **MANY}),
    "decode_many, file": (decode_one_of_many, {}, {"data": ["file"]}),
    "Codec.encode": (Codec.encode, {"image": GOOD}, {"image": PILLOW, "quality": ["quality"], **FLAGS}),
    "Codec.encode_to": (Codec.encode_to, {"image": GOOD}, TARGETS),
    "Codec.encode_to, image": (Codec.encode_to, {"image": GOOD, "size": 999}, {"image": PILLOW, **FLAGS}),
    "Codec.decode": (Codec.decode, {"data": b""}, {"data": ["file"], "upto": ["upto"], "max_pixels": ["max_pixels"],
                                                   "partial": ["flag"], "damaged": ["flag"]}),
    "Codec.verify": (Codec.verify, {}, {"data": ["file"]}),
}  # fmt: skip

CASES = [
    pytest.param(name, argument, kind, id=f"{name}-{argument}-{kind}")
    for name, (_, _, arguments) in FUNCTIONS.items()
    for argument, kinds in arguments.items()
    for kind in kinds
]


def ended(result: Any) -> None:
    """Run a generator to its end: whether a model can be used is known when the first item is asked for."""
    if isinstance(result, Iterator):
        list(result)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument", "kind"), CASES)
def test_a_wrong_argument_is_named(codec: Codec, name: str, argument: str, kind: str) -> None:
    function, others, _ = FUNCTIONS[name]
    first = (codec,) if name.startswith("Codec.") else ()
    if "device" in function.__code__.co_varnames and argument != "device":
        others = {"device": "cpu", **others}
    for make in KINDS[kind]:
        wrong = make()
        # What cannot be read has errors of its own, and so have models.
        about_content = kind in (*IMAGES, "file", "model")
        with pytest.raises(HpcmrefError if about_content else ConfigError) as caught:
            ended(function(*first, **{**others, argument: wrong}))
        sentence = str(caught.value)
        assert 5 < len(sentence) < 400, sentence
        assert "\n" not in sentence
        if isinstance(caught.value, ConfigError):
            assert argument in sentence, sentence


@pytest.mark.parametrize("wrong", [31.5, "high", None.__class__, [], b""])
def test_a_wrong_type_is_a_type_error_too(codec: Codec, wrong: Any) -> None:
    for call in (lambda: hpcmref.encode(GOOD, wrong, device="cpu"), lambda: codec.encode(GOOD, wrong)):
        with pytest.raises(TypeError, match="quality"):
            call()
        with pytest.raises(ArgumentTypeError, match="a whole number, 0 to 63"):
            call()


def test_python_itself_answers_unknown_arguments() -> None:
    for call in (lambda: hpcmref.encode(), lambda: hpcmref.decode(b"", qualty=3), lambda: hpcmref.info(b"", 3)):  # type: ignore
        with pytest.raises(TypeError):
            call()


def test_a_file_object_of_an_image_that_is_open_in_text_mode_says_so() -> None:
    with (DATA / "README.md").open() as file, pytest.raises(ArgumentTypeError, match=r"image .* binary mode"):
        hpcmref.encode(file)  # type: ignore[arg-type]


def test_a_path_that_is_missing_is_named() -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png: No such file"):
        hpcmref.encode("nowhere.png")
    with pytest.raises(HpcmrefError, match=r"nowhere\.bin: No such file"):
        hpcmref.decode("nowhere.bin")


def test_a_file_that_is_open_in_text_mode_is_a_wrong_type() -> None:
    calls: list[Callable[..., Any]] = [hpcmref.decode, hpcmref.info, hpcmref.encode]
    for call in calls:
        for file in (text_file(), io.StringIO("text")):
            with pytest.raises(ArgumentTypeError, match="open it in binary mode"):
                call(file)


def test_a_file_that_was_read_to_its_end_must_be_rewound() -> None:
    calls: dict[Callable[..., Any], type[HpcmrefError]] = {hpcmref.decode: HpcmrefError, hpcmref.encode: ImageError}
    for call, error in calls.items():
        with pytest.raises(error, match=r"nothing is left to read.*seek\(0\)"):
            call(file_at_its_end())
        with pytest.raises(error, match="not an"):
            call(io.BytesIO())


class Unseekable(io.BytesIO):
    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")


def test_a_stream_without_a_position_can_be_empty() -> None:
    with pytest.raises(ImageError, match="not an image"):
        hpcmref.encode(Unseekable())


def test_a_number_beyond_floats_is_a_wrong_value() -> None:
    wrong: list[dict[str, Any]] = [{"psnr": 10**400}, {"bpp": 10**400}, {"effort": 1, "max_seconds": 10**400}]
    for options in wrong:
        with pytest.raises(ConfigError, match="must be a finite number above 0"):
            hpcmref.encode(GOOD, device="cpu", **options)


def test_the_layout_of_a_tensor_is_named() -> None:
    zeros = torch.zeros(3, 4, 4)
    wrong = {"sparse": zeros.to_sparse(), "sparse_csr": zeros.to_sparse_csr(), "mkldnn": zeros.to_mkldnn()}
    for layout, tensor in {**wrong, "nested": nested_tensor()}.items():
        with pytest.raises(ArgumentTypeError, match=f"image is a .*{layout}.*dense"):
            hpcmref.encode(tensor)


def test_a_tensor_with_a_pending_sign_is_encoded_as_its_values() -> None:
    values = torch.linspace(0, 1, 48).reshape(3, 4, 4)
    negated = torch.complex(values, -values).conj().imag
    assert negated.is_neg()
    assert hpcmref.encode(negated, 20, device="cpu") == hpcmref.encode(values, 20, device="cpu")


@pytest.mark.filterwarnings("ignore:16")
@pytest.mark.parametrize("kind", ["u2", "f4", "f8"])
def test_the_order_of_the_bytes_of_an_array_makes_no_difference(kind: str) -> None:
    ramp = np.linspace(0, 1 if kind[0] == "f" else 65535, 12 * 9).reshape(12, 9)
    for values in (ramp, np.stack([ramp, ramp, ramp[::-1]], axis=2)):
        big, little = (
            hpcmref.encode(np.ascontiguousarray(values.astype(order + kind)), 20, device="cpu") for order in "><"
        )
        assert big == little


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.int8), np.zeros((4, 4), ">i8"), np.array([[None]]), np.array([["a"]]),
        np.full((4, 4), np.nan), np.zeros((0, 3)), np.zeros(3), np.zeros((4, 4), complex),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)  # fmt: skip
def test_lossless_says_the_same_of_an_array_that_is_no_image(array: np.ndarray[Any, Any]) -> None:
    sentences = []
    for lossless in (False, True):
        with pytest.raises(ImageError) as caught:
            hpcmref.encode(array, device="cpu", lossless=lossless)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "f4"])
def test_lossless_refuses_more_than_8_bits(dtype: str) -> None:
    with pytest.raises(ImageError, match="more than 8 bits"):
        hpcmref.encode(np.zeros((4, 4), dtype), lossless=True)
