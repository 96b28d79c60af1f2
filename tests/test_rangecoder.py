"""Do symbols survive the range coder, and do hostile payloads leave it unharmed?"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmref.errors import ConfigError, FormatError, TruncatedError
from hpcmref.format import rangecoder, rans_builtin, rans_compressai
from hpcmref.format.rangecoder import SymbolDecoder, SymbolEncoder, scale_table

DATA = Path(__file__).parent / "data"
has_compressai = pytest.mark.skipif(rans_compressai.find() is None, reason="CompressAI is not installed")


@pytest.fixture(params=["compressai", "builtin", "python"], autouse=True)
def coder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs with every coder."""
    if request.param == "compressai" and rans_compressai.find() is None:
        pytest.skip("CompressAI is not installed")
    use(request.param, monkeypatch)


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rangecoder, "_coder", lambda: rans_compressai if name == "compressai" else rans_builtin)
    if name == "python":
        monkeypatch.setattr(rans_builtin, "_library", lambda: None)


Step = tuple[np.ndarray, np.ndarray]


def encode(*steps: Step) -> bytes:
    encoder = SymbolEncoder()
    for symbols, indexes in steps:
        encoder.put(symbols, indexes)
    return encoder.payload()


def assert_survives(*steps: Step) -> None:
    payload = encode(*steps)
    assert len(payload) % 4 == 0
    decoder = SymbolDecoder(payload, sum(symbols.size for symbols, _ in steps))
    for symbols, indexes in steps:
        decoded = decoder.get(indexes)
        assert decoded.dtype == np.int32
        np.testing.assert_array_equal(decoded, symbols)


def flat(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_the_tables_are_those_of_every_file_ever_written() -> None:
    with np.load(Path(rangecoder.__file__).parent / "tables.npz") as stored:
        checksums = {name: zlib.crc32(array.tobytes()) for name, array in stored.items()}
    assert checksums == {
        "scale_table": 0x47291607,
        "cdf": 0x17E2A815,
        "cdf_length": 0x128E226E,
        "offset": 0x4B758E4A,
    }


def test_what_the_safety_of_the_decoder_rests_on() -> None:
    tables = rangecoder._tables()
    for cdf, length in zip(tables.cdfs, tables.lengths, strict=True):
        assert len(cdf) == length
        assert cdf[0] == 0
        assert cdf[-2] == 1 << 16
        frequencies = np.diff(cdf)
        assert frequencies[-1] == 0  # of CompressAI's own escape
        assert frequencies[:-1].min() > 0
    assert max(cdf[-2] - cdf[-3] for cdf in tables.cdfs) <= 422
    assert set(np.diff(tables.cdfs[tables.of_bytes])) == {256, 0}


@has_compressai
def test_the_official_coder_and_tables_are_reproduced() -> None:
    """With the tables as stored, CompressAI's own escapes included."""
    stored = rangecoder._stored()
    with np.load(DATA / "rans_golden.npz") as golden:
        symbols, indexes, stream = golden["symbols"].tolist(), golden["indexes"].tolist(), golden["stream"].tobytes()
    tables = stored["cdf"].tolist(), stored["cdf_length"].tolist(), stored["offset"].tolist()
    encoder = rans_compressai.ans().BufferedRansEncoder()
    encoder.encode_with_indexes(symbols, indexes, *tables)
    assert encoder.flush() == stream
    decoder = rans_compressai.ans().RansDecoder()
    decoder.set_stream(stream)
    assert decoder.decode_stream(indexes, *tables) == symbols


class PlainDecoder:
    """The payload section of FORMAT.md, word by word."""

    def __init__(self, payload: bytes) -> None:
        with np.load(Path(rangecoder.__file__).parent / "tables.npz") as stored:
            self.offsets = stored["offset"].tolist()
            self.tables = [c[:n].tolist() for c, n in zip(stored["cdf"], stored["cdf_length"], strict=True)]
        self.x = int.from_bytes(payload[:8], "little")
        self.words = [int.from_bytes(payload[i : i + 4], "little") for i in range(8, len(payload), 4)]

    def symbol(self, c: list[int]) -> int:
        m = self.x % 65536
        s = next(s for s in range(len(c) - 1) if c[s] <= m < c[s + 1])
        self.x = (c[s + 1] - c[s]) * (self.x // 65536) + m - c[s]
        if self.x < 1 << 31:
            self.x = (self.x << 32) + self.words.pop(0)
        return s

    def step(self, indexes: list[int]) -> list[int]:
        symbols = [self.symbol(self.tables[i]) for i in indexes]
        uniform = list(range(0, 65537, 256))
        values = []
        for s, i in zip(symbols, indexes, strict=True):
            if s == len(self.tables[i]) - 2:
                low, high = self.symbol(uniform), self.symbol(uniform)
                values.append(int.from_bytes([low, high], "little", signed=True))
            else:
                values.append(self.offsets[i] + s)
        return values


def test_the_format_as_documented_decodes_what_is_encoded() -> None:
    rng = np.random.default_rng(0)
    steps = []
    for count in (7, 0, 100, 33):
        indexes = rng.integers(0, 60, count)
        symbols = np.round(rng.normal(size=count) * scale_table()[indexes]).astype(np.int32)
        symbols[::9] = rng.integers(-32768, 32768, symbols[::9].size)
        steps.append((symbols, indexes))
    decoder = PlainDecoder(encode(*steps))
    for symbols, indexes in steps:
        assert decoder.step(indexes.tolist()) == symbols.tolist()


def test_a_payload_byte_for_byte() -> None:
    """Files are kept for years: if this changes, old files cannot be read and the version must."""
    payload = encode((flat(0, 3, -700, 1), flat(0, 20, 59, 10)), (flat(-2, 32767), flat(30, 0)))
    assert payload.hex() == "699fbaec0e050000e6fa6ba927ff7f00"


def test_the_scales_grow_from_0_12_to_64() -> None:
    table = scale_table()
    assert table.shape == (60,)
    assert table.dtype == np.float32
    assert (np.diff(table) > 0).all()
    np.testing.assert_allclose(table[[0, -1]], [0.12, 64], rtol=1e-6)


@settings(deadline=None)
@given(st.data())
def test_what_is_encoded_is_decoded(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    steps = []
    for count in data.draw(st.lists(st.integers(0, 40), max_size=5)):
        indexes = rng.integers(0, 60, count)
        spread = data.draw(st.sampled_from([0.5, 1, 10, 1000]))
        symbols = np.clip(np.round(rng.normal(size=count) * scale_table()[indexes] * spread), -32768, 32767)
        steps.append((symbols.astype(np.int32), indexes))
    assert_survives(*steps)


@pytest.mark.parametrize("index", range(60))
def test_every_symbol_of_a_table_and_its_neighbours(index: int) -> None:
    tables = rangecoder._tables()
    symbols = np.arange(tables.lowest[index] - 3, tables.escapes[index] + 4)
    assert_survives((symbols, np.full(symbols.size, index)))


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64])
def test_any_kind_of_integer(kind: type[np.signedinteger]) -> None:
    symbols = np.array([0, 1, -1, 127, -128], kind)
    assert_survives((symbols, np.array([0, 59, 30, 10, 0], np.uint8)))


@pytest.mark.parametrize("index", [0, 59])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_few_extreme_symbols(count: int, index: int) -> None:
    for value in (0, 1, -32768, 32767, int(rangecoder._tables().escapes[index])):
        assert_survives((np.full(count, value), np.full(count, index)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 50])
def test_the_least_likely_symbols_fit_into_the_buffer_that_is_allocated_for_them(count: int) -> None:
    """The escape of table 0 has frequency 1 of 65536, so two of them fill a word: symbols cannot cost more."""
    escape = int(rangecoder._tables().escapes[0])
    encoder = SymbolEncoder()
    encoder._append(np.full(count, escape), np.zeros(count, int))
    assert len(encoder.payload()) <= 4 * (count + 2)


def test_nothing_is_no_bytes() -> None:
    assert encode() == b""
    assert encode((flat(), flat())) == b""
    assert SymbolDecoder(b"", 0).get(flat()).size == 0


def test_the_price_of_a_symbol_and_of_an_escape() -> None:
    zeros = np.zeros(10_000, np.int32)
    assert len(encode((zeros, zeros))) == 8
    few, many = (len(encode((np.full(n, 9999), np.zeros(n, int)))) for n in (100, 1100))
    assert (many - few) / 1000 == 4  # 16 bits for the escape (frequency 1 of 65536), 16 for the value


@pytest.mark.parametrize("length", range(101))
def test_random_payloads_decode_to_something_or_are_refused(length: int) -> None:
    """The read itself is what is tested here: run under a memory checker, this test must be silent."""
    rng = np.random.default_rng(length)
    for _ in range(5):
        payload = bytearray(rng.bytes(length))
        if length >= 8:
            payload[7] &= 127  # else half of the states are refused at once
        indexes = rng.integers(0, 60, 500)
        try:
            decoder = SymbolDecoder(bytes(payload), 500)
            symbols = np.concatenate([decoder.get(part) for part in np.split(indexes, 5)])
        except FormatError:
            continue
        assert symbols.shape == (500,)
        assert np.abs(symbols).max() <= 32768


@pytest.mark.parametrize(
    ("attempt", "payload"),
    [
        ("no bytes for a symbol", b""),
        ("less than a state", b"\xff" * 7),
        ("a length that is no multiple of a word", b"\xff" * 6 + b"\x0f\0\0"),
        ("the state 0, which reads a word for every symbol", bytes(8)),
        ("the largest state below the valid ones", (2**31 - 1).to_bytes(8, "little")),
        ("the smallest state above the valid ones", (2**63).to_bytes(8, "little")),
    ],
)
def test_a_payload_that_no_encoder_writes(attempt: str, payload: bytes) -> None:
    with pytest.raises(FormatError):
        SymbolDecoder(payload, 1)


def test_nothing_but_escapes_is_refused_before_their_values_are_read() -> None:
    """The likeliest escape costs 7.3 bits; without the 16 of its value a payload can say it too often."""
    tables = rangecoder._tables()
    count = 1000
    encoder = SymbolEncoder()
    encoder._append(np.full(count, tables.escapes[58] - tables.lowest[58]), np.full(count, 58))
    with pytest.raises(FormatError, match="escapes"):
        SymbolDecoder(encoder.payload(), count).get(np.full(count, 58))


def test_honest_escapes_are_never_refused() -> None:
    for index in range(60):
        symbols = np.full(300, 32767)
        assert_survives((symbols, np.full(300, index)))


def test_a_truncated_payload_decodes_to_the_right_symbols_and_then_to_an_error() -> None:
    rng = np.random.default_rng(0)
    indexes = rng.integers(0, 60, 2000)
    symbols = np.round(rng.normal(size=2000) * scale_table()[indexes] * 0.7).astype(np.int32)
    payload = encode((symbols, indexes))
    half = payload[: len(payload) // 8 * 4]
    decoder = SymbolDecoder(half, 2000)
    assert (decoder.get(indexes[:800]) == symbols[:800]).all()
    assert decoder.is_whole
    with pytest.raises(TruncatedError):
        decoder.get(indexes[800:])
    assert not decoder.is_whole


def test_an_honest_payload_is_not_refused_too_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Small blocks: every look at what is left must let an honest payload pass, and stop a short one soon."""
    monkeypatch.setattr(rangecoder, "_BLOCK", 8)
    rng = np.random.default_rng(0)
    for count in range(1, 400, 7):
        indexes = rng.integers(0, 60, count)
        symbols = np.round(rng.normal(size=count) * scale_table()[indexes]).astype(np.int32)
        assert_survives((symbols, indexes))


@has_compressai
def test_a_short_payload_is_not_padded_to_what_it_is_said_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    use("compressai", monkeypatch)
    monkeypatch.setattr(rangecoder, "_BLOCK", 8)

    class Stream:
        def set_stream(self, stream: bytes) -> None:
            self.size = len(stream)

    monkeypatch.setattr(rans_compressai.ans(), "RansDecoder", Stream)
    assert SymbolDecoder(bytes(4) + b"\1" + bytes(7), 10**9)._coder._coder.size < 20_000 + 12


@pytest.mark.parametrize(
    ("symbols", "indexes"),
    [
        (flat(32768), flat(0)),
        (flat(-32769), flat(0)),
        (flat(0), flat(60)),
        (flat(0), flat(-1)),
        (flat(0, 0), flat(0)),
        (flat(0), flat(0, 0)),
        (flat(0).reshape(1, 1), flat(0).reshape(1, 1)),
    ],
)
def test_the_encoder_refuses_what_it_cannot_write(symbols: np.ndarray, indexes: np.ndarray) -> None:
    with pytest.raises(ConfigError):
        SymbolEncoder().put(symbols, indexes)


@pytest.mark.parametrize("indexes", [flat(60), flat(-1), flat(0, 0), flat(0).reshape(1, 1)])
def test_the_decoder_refuses_what_it_cannot_read(indexes: np.ndarray) -> None:
    with pytest.raises(ConfigError):
        SymbolDecoder(encode((flat(0), flat(0))), 1).get(indexes)


def outcome(payload: bytes, indexes: np.ndarray) -> bytes | str:
    """The symbols that a payload decodes to in three steps, or the class of the error."""
    try:
        decoder = SymbolDecoder(payload, indexes.size)
        return b"".join(decoder.get(part).tobytes() for part in np.array_split(indexes, 3))
    except FormatError as error:
        return type(error).__name__


@has_compressai
@pytest.mark.parametrize("other", ["builtin", "python"])
def test_both_coders_do_the_same(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bytes, then equal symbols or equal errors for each truncation and for damaged payloads."""
    monkeypatch.setattr(rangecoder, "_BLOCK", 64)
    rng = np.random.default_rng(5)
    indexes = rng.integers(0, 60, 300)
    symbols = np.round(rng.normal(size=300) * scale_table()[indexes]).astype(np.int32)
    symbols[::40] = rng.integers(-32768, 32768, 8)
    found = []
    for name in ("compressai", other):
        use(name, monkeypatch)
        payload = encode((symbols, indexes))
        changes = np.random.default_rng(6)
        payloads = [payload[:length] for length in range(len(payload))]
        for _ in range(300):
            damaged = bytearray(payload)
            damaged[changes.integers(len(payload))] ^= 1 << changes.integers(8)
            payloads.append(bytes(damaged))
        found.append((payload, [outcome(each, indexes) for each in payloads]))
    assert found[0] == found[1]
    assert {"FormatError", "TruncatedError"} <= {each for each in found[0][1] if isinstance(each, str)}


def test_the_libraries_were_built_from_the_source_that_is_here() -> None:
    """`tools/build_rans.py` writes the hash after it has built all of them."""
    folder = rans_builtin.library_path().parent
    # A checkout on Windows may have other line ends.
    source = (folder / "rans.c").read_bytes().replace(b"\r\n", b"\n")
    assert hashlib.sha256(source).hexdigest() == (folder / "SOURCE.sha256").read_text().strip()
    assert len([*folder.glob("*.so"), *folder.glob("*.dylib"), *folder.glob("*.dll")]) == 6


@pytest.mark.parametrize(
    ("system", "machine", "build", "library"),
    [
        ("Linux", "x86_64", "linux-x86_64", "linux-x86_64.so"),
        ("Linux", "aarch64", "linux-aarch64", "linux-aarch64.so"),
        ("Darwin", "arm64", "macosx-11.0-universal2", "darwin-arm64.dylib"),
        ("Darwin", "x86_64", "macosx-11.0-universal2", "darwin-x86_64.dylib"),
        ("Windows", "AMD64", "win-amd64", "windows-amd64.dll"),
        ("Windows", "ARM64", "win-arm64", "windows-arm64.dll"),
        ("Windows", "ARM64", "win-amd64", "windows-amd64.dll"),  # emulated
    ],
)
def test_each_platform_has_its_library(
    system: str, machine: str, build: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("sysconfig.get_platform", lambda: build)
    assert rans_builtin.library_path().name == library
    assert rans_builtin.library_path().is_file()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("builtin", "builtin (C)"), pytest.param("compressai", "compressai", marks=has_compressai), ("x", "ConfigError")],
)
def test_the_environment_chooses_the_coder(wanted: str, expected: str) -> None:
    code = "from hpcmref.format.rangecoder import implementation\nprint(implementation())"
    environment = {**os.environ, "HPCMREF_RANGECODER": wanted, "PYTHONPATH": str(DATA.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert expected in done.stdout + done.stderr


def test_a_platform_without_a_library_warns_that_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "mips")
    rans_builtin._library.cache_clear()
    with pytest.warns(UserWarning, match="slow"):
        assert rans_builtin.name() == "builtin (Python)"
    rans_builtin._library.cache_clear()


def test_the_package_compressai_is_not_imported() -> None:
    code = """
import builtins, sys
real = builtins.__import__
def guarded(name, *args, **kwargs):
    if name.partition(".")[0] in ("compressai", "torch"):
        raise ImportError(name)
    return real(name, *args, **kwargs)
builtins.__import__ = guarded
import numpy as np
from hpcmref.format.rangecoder import SymbolDecoder, SymbolEncoder
symbols, indexes = np.arange(-50, 50), np.arange(100) % 60
encoder = SymbolEncoder()
encoder.put(symbols, indexes)
assert (SymbolDecoder(encoder.payload(), 100).get(indexes) == symbols).all()
assert "compressai" not in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(rangecoder.__file__).parents[1])
