"""Checkpoint files: round trips, equal bytes, damage that is noticed, writes that are all or nothing."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyquant import QuantizedWeight, checkpoint, quantize
from pyquant.checkpoint import CheckpointError, Reader
from pyquant.formats import FORMATS, ScaleType, ZeroType

VARIANTS = [(row.name, s, z) for row in FORMATS.values() for s in row.scale_types for z in row.zero_types]


def make_weight(name: str = "nf4", n: int = 48, k: int = 128, **arguments: object) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.linspace(-1, 1, FORMATS[name].levels) if FORMATS[name].needs_codebook else None
    return quantize(torch.randn(n, k, generator=generator), name, codebook=codebook, **arguments)


def make_tensors() -> dict[str, torch.Tensor | QuantizedWeight]:
    return {
        "layer.weight": make_weight("nf4", 4, 80, nested=True),  # 80 is no multiple of 64: flat scales
        "layer.bias": torch.arange(4, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False, True]),
    }


def same(a: torch.Tensor | QuantizedWeight, b: torch.Tensor | QuantizedWeight) -> bool:
    """Equal bit for bit."""
    if isinstance(a, QuantizedWeight) or isinstance(b, QuantizedWeight):
        if not (isinstance(a, QuantizedWeight) and isinstance(b, QuantizedWeight)):
            return False
        a, b = a.state_dict(), b.state_dict()
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_content(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("name", "scale_type", "zero_type"), VARIANTS)
@pytest.mark.parametrize("k", [128, 96])
def test_round_trip(tmp_path: Path, name: str, scale_type: ScaleType, zero_type: ZeroType, k: int) -> None:
    weight = make_weight(name, k=k, scale_type=scale_type, zero_type=zero_type)
    checkpoint.save(tmp_path / "f", {"a.weight": weight})
    loaded = checkpoint.load(tmp_path / "f")
    assert loaded.keys() == {"a.weight"}
    assert same(loaded["a.weight"], weight)
    assert torch.equal(loaded["a.weight"].dequantize(), weight.dequantize())
    assert loaded["a.weight"].format is weight.format


def test_round_trip_of_other_tensors(tmp_path: Path) -> None:
    dtypes = list(checkpoint._DTYPE_NAMES)
    tensors = {str(d): torch.tensor([[1, 0, 2]], dtype=torch.float32).to(d) for d in dtypes}
    tensors |= {"strided": torch.arange(12.0).view(3, 4).t(), "nan": torch.tensor([float("nan"), -0.0])}
    tensors["needs_grad"] = torch.ones(2, requires_grad=True)
    checkpoint.save(tmp_path / "f", tensors, {"format": "pt", "note": "Größe \n 7"})
    assert same_content(checkpoint.load(tmp_path / "f"), tensors)
    with Reader(tmp_path / "f") as reader:
        assert {k: v for k, v in reader.metadata.items() if k != "pyquant"} == {
            "format": "pt",
            "note": "Größe \n 7",
        }


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tensors, metadata = make_tensors(), {"b": "1", "a": "2", "format": "pt"}
    for i in range(4):
        checkpoint.save(tmp_path / str(i), tensors, metadata)
        tensors = dict(reversed(tensors.items()))
        metadata = dict(reversed(metadata.items()))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(4)}) == 1


def test_other_readers_can_open_it(tmp_path: Path) -> None:
    tensors = make_tensors()
    checkpoint.save(tmp_path / "f", tensors)
    stored = load_file(tmp_path / "f")
    assert same(QuantizedWeight.from_state_dict(stored, "layer.weight."), tensors["layer.weight"])
    with Reader(tmp_path / "f") as reader:
        info = json.loads(reader.metadata["pyquant"])
    assert info["crc32"] == {name: zlib.crc32(raw(t)) for name, t in stored.items()}
    assert info["layers"]["layer.weight"] == {
        "format": "nf4",
        "bits": 4,
        "group_size": 64,
        "scale_type": "nested",
        "zero_type": "none",
        "shape": [4, 80],
    }


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    tensors = make_tensors()
    stored = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    save_file(stored | tensors["layer.weight"].state_dict("layer.weight."), tmp_path / "f")
    assert same_content(checkpoint.load(tmp_path / "f"), tensors)
    with Reader(tmp_path / "f") as reader:
        assert not reader.checked


def test_stored_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE", 8)  # several pieces of a tensor, the last one short
    tensors = make_tensors() | {"empty": torch.empty(0, 3), "odd": torch.arange(13, dtype=torch.uint8)}
    plain = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    checkpoint.save(tmp_path / "a", tensors)
    with Reader(tmp_path / "a") as reader:
        stored = {name: reader.stored(name) for name in plain}
        assert same_content({name: s.read() for name, s in stored.items()}, plain)
        for name, s in stored.items():
            assert (s.dtype, s.shape, s.nbytes) == (plain[name].dtype, tuple(plain[name].shape), plain[name].nbytes)
        for missing in ("nothing", "layer.weight", "layer.weight.codes"):
            with pytest.raises(KeyError, match=missing):
                reader.stored(missing)
        checkpoint.save(tmp_path / "b", tensors | stored)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(100)}, tmp_path / "f")
    with Reader(tmp_path / "f") as reader:
        stored = reader.stored("w")
    with open(tmp_path / "f", "r+b") as file:
        file.truncate(stored.offset + 200)
    for read in (stored.read, lambda: list(stored.pieces())):
        with pytest.raises(CheckpointError, match=r"/f: w: the file has become shorter while it was read"):
            read()
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.save(tmp_path / "g", {"w": stored})
    assert [f.name for f in tmp_path.iterdir()] == ["f"]


def test_reader_reads_one_at_a_time(tmp_path: Path) -> None:
    tensors = make_tensors()
    checkpoint.save(tmp_path / "f", tensors)
    with Reader(tmp_path / "f") as reader:
        assert reader.checked
        assert list(reader) == reader.keys() == sorted(tensors)
        assert len(reader) == len(tensors)
        assert reader.is_quantized("layer.weight")
        assert not reader.is_quantized("scalar")
        assert "scalar" in reader
        assert "layer.weight.codes" not in reader
        bias = reader["layer.bias"]
        for missing in ("nothing", "layer.weight.codes"):
            with pytest.raises(KeyError, match=missing):
                reader[missing]
    assert same(bias, tensors["layer.bias"])  # valid after the file is closed


def is_noticed(path: Path, data: bytes, expected: dict) -> bool:
    """Load damaged ``data``. True when that is an error, False when the content is right in spite of it."""
    path.write_bytes(data)
    try:
        content = checkpoint.load(path)
    except CheckpointError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return True
    assert same_content(content, expected), "damage passed unnoticed"
    return False


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict]:
    path = tmp_path_factory.mktemp("sample") / "f"
    checkpoint.save(path, make_tensors(), {"format": "pt"})
    return path.read_bytes(), checkpoint.load(path)


def data_start(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


@pytest.mark.parametrize("mask", [0x01, 0x10, 0x20, 0x80])
def test_header_damage_is_noticed_or_harmless(tmp_path: Path, sample: tuple[bytes, dict], mask: int) -> None:
    data, expected = sample
    noticed = [is_noticed(tmp_path / "f", flipped(data, i, mask), expected) for i in range(data_start(data))]
    # What may go unseen: padding, and the name of the metadata entry that holds the checksums.
    assert sum(not n for n in noticed) <= 8 + len("pyquant") + len("__metadata__")


def test_data_damage_names_file_and_tensor(tmp_path: Path, sample: tuple[bytes, dict]) -> None:
    data, _ = sample
    header = json.loads(data[8 : data_start(data)])
    path = tmp_path / "f"
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (data_start(data) + offset for offset in entry["data_offsets"])
        for at in sorted({*range(begin, end, 7), *range(max(begin, end - 1), end)}):
            path.write_bytes(flipped(data, at, 1 << at % 8))
            with pytest.raises(CheckpointError) as error:
                checkpoint.load(path)
            assert str(path) in str(error.value)
            assert f" {name}:" in str(error.value)


def test_truncated_and_longer_files(tmp_path: Path, sample: tuple[bytes, dict]) -> None:
    data, expected = sample
    lengths = {*range(0, 64), *range(64, len(data), 41), data_start(data), len(data) - 1}
    for length in sorted(lengths):
        assert is_noticed(tmp_path / "f", data[:length], expected)
    for more in (b"\0", b" " * 8, data):
        assert is_noticed(tmp_path / "f", data + more, expected)


def test_header_lengths(tmp_path: Path, sample: tuple[bytes, dict]) -> None:
    data, expected = sample
    length = data_start(data) - 8
    wrong = {
        0,
        1,
        2,
        length - 8,
        length - 1,
        length + 1,
        length + 8,
        len(data),
        2**31,
        2**32 + length,
        2**63,
        2**64 - 1,
    }
    for value in sorted(wrong - {length}):
        assert is_noticed(tmp_path / "f", struct.pack("<Q", value) + data[8:], expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04" + b"\0" * 64,
        b"\x80\x02}q\0." * 9,
        struct.pack("<Q", 2) + b"[]",
        b"GGUF" + bytes(99),
    ],
)
def test_other_files(tmp_path: Path, data: bytes) -> None:
    assert is_noticed(tmp_path / "f", data, {})


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="directory"):
        checkpoint.load(tmp_path)


def rewrite_info(data: bytes, **changes: object) -> bytes:
    """The file with its ``pyquant`` entry changed, and a header checksum that is right again."""
    header = json.loads(data[8 : data_start(data)])
    info = json.loads(header["__metadata__"]["pyquant"]) | changes
    info.pop("header_crc32")
    layout = {n: (e["dtype"], e["shape"]) for n, e in header.items() if n != "__metadata__"}
    others = {k: v for k, v in header["__metadata__"].items() if k != "pyquant"}
    info["header_crc32"] = checkpoint._header_crc32(layout, others, info)
    header["__metadata__"]["pyquant"] = json.dumps(info)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[data_start(data) :]


def test_malformed_checksums(tmp_path: Path, sample: tuple[bytes, dict]) -> None:
    data, expected = sample
    assert not is_noticed(tmp_path / "f", rewrite_info(data), expected)
    for changes in ({"version": 2}, {"version": None}, {"crc32": []}, {"crc32": {}}, {"crc32": None}):
        assert is_noticed(tmp_path / "f", rewrite_info(data, **changes), expected)
    header = json.loads(data[8 : data_start(data)])
    for text in ("", "[]", "null", "{", "7", '{"version": 1}', "[" * 100_000):
        header["__metadata__"]["pyquant"] = text
        changed = json.dumps(header).encode()
        assert is_noticed(
            tmp_path / "f", struct.pack("<Q", len(changed)) + changed + data[data_start(data) :], expected
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 39, dtype=torch.uint8)}, "codes"),
        ({"scales": torch.zeros(3)}, "scales"),
        ({"scales": None}, "scales"),
        ({"nested_map": None}, "nested_map"),
        ({"quant_spec": torch.tensor([1, 99, 0, 0, 64, 4, 80])}, "format id"),
        ({"quant_spec": torch.tensor([2, 0, 0, 0, 64, 4, 80])}, "version"),
        ({"quant_spec": torch.tensor([1, 0, 77, 0, 64, 4, 80])}, "scale type"),
        ({"quant_spec": torch.tensor([1, 0, 6, 0, 0, 4, 80])}, "group_size"),
        ({"quant_spec": torch.tensor([1, 0, 6, 0, 64, -4, 80])}, "shape"),
        ({"quant_spec": torch.tensor([1, 0, 6, 0, 64, 4, 2**62])}, "codes|shape|scales"),
        ({"quant_spec": torch.tensor([1.0])}, "quant_spec"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    state = make_tensors()["layer.weight"].state_dict() | change
    tensors = {f"layer.weight.{name}": t for name, t in state.items() if t is not None}
    checkpoint.save(tmp_path / "f", tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(tmp_path / "f")
    assert str(error.value).startswith(f"{tmp_path / 'f'}: ")


def test_save_refuses(tmp_path: Path) -> None:
    weight = make_weight()
    path = tmp_path / "f"
    with pytest.raises(TypeError, match="save: a: expected a dense tensor"):
        checkpoint.save(path, {"a": [1.0]})
    with pytest.raises(TypeError, match="dense"):
        checkpoint.save(path, {"a": torch.ones(2, 2).to_sparse()})
    with pytest.raises(TypeError, match="dense"):
        checkpoint.save(path, {"a": torch.ones(2, 2, device="meta")})
    with pytest.raises(ValueError, match="taken"):
        checkpoint.save(path, {"a": weight, "a.codes": torch.ones(1)})
    with pytest.raises(ValueError, match="taken"):
        checkpoint.save(path, {"__metadata__": torch.ones(1)})
    with pytest.raises(ValueError, match="complex128"):
        checkpoint.save(path, {"a": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="taken"):
        checkpoint.save(path, {}, {"pyquant": "x"})
    with pytest.raises(TypeError, match="strings"):
        checkpoint.save(path, {}, {"x": 1})
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "none" / "f", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str
) -> None:
    path = tmp_path / "f"
    checkpoint.save(path, {"old": torch.ones(3)})
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise error

    owner, name = {"write": (checkpoint, "_buffer"), "fsync": (os, "fsync"), "replace": (os, "replace")}[when]
    if when == "write":  # the checksums are done, and part of the file is written
        original, calls = checkpoint._buffer, []

        def fail_late(tensor: torch.Tensor) -> memoryview:
            calls.append(tensor)
            if len(calls) > 3:
                raise error
            return original(tensor)

        monkeypatch.setattr(owner, name, fail_late)
    else:
        monkeypatch.setattr(owner, name, fail)
    with pytest.raises(type(error)):
        checkpoint.save(path, {"new": torch.zeros(3), "more": torch.zeros(3)})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_saving_over_the_file_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    checkpoint.save(path, make_tensors())
    tensors = checkpoint.load(path)
    checkpoint.save(path, tensors | {"scalar": torch.tensor(8)})
    assert same(checkpoint.load(path)["layer.weight"], tensors["layer.weight"])
    assert tensors["scalar"].item() == 7
