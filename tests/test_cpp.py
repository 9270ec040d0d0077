"""The installed package from C and C++: find_package, both headers, the example server, damaged files."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from pyquant import QuantizedWeight, checkpoint, quantize
from pyquant.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "pyquant" / "lib" / "libcutlass_ext.so"
OK, BAD_REQUEST, UNKNOWN_LAYER, WRONG_SHAPE, TOO_LARGE = range(5)

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


Result = subprocess.CompletedProcess[str]


def run(*command: object, timeout: float = 300) -> Result:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout)


def cmake_prefix() -> Path:
    result = run(sys.executable, "-m", "pyquant", "--cmake-prefix")
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def configure(source: Path, build: Path, prefix: Path, *options: str) -> Result:
    command = ["cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", *options]
    if ccache := shutil.which("ccache"):
        command += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("C", "CXX")]
    return run(*command)


def build(source: Path, folder: Path) -> Path:
    result = configure(source, folder, cmake_prefix())
    assert result.returncode == 0, result.stdout + result.stderr
    result = run("cmake", "--build", folder, "--parallel", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def cpp_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example program, built as its README says."""
    return build(ROOT / "examples" / "cpp_server", tmp_path_factory.mktemp("cpp_server")) / "cpp_server"


@pytest.fixture(scope="module")
def consumers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "tests" / "cpp", tmp_path_factory.mktemp("consumers"))


# Checkpoints


def make_weight(name: str, n: int, k: int, **arguments: object) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n * k)
    codebook = torch.linspace(-1, 1, FORMATS[name].levels) if FORMATS[name].needs_codebook else None
    return quantize(torch.randn(n, k, generator=generator), name, codebook=codebook, **arguments)


def write_checkpoint(path: Path) -> list[str]:
    """Layers of every format, scale and zero type, with and without bias; returns their names."""
    biases = [None, torch.float32, torch.float16, torch.bfloat16]
    tensors: dict[str, torch.Tensor | QuantizedWeight] = {"norm.weight": torch.ones(5)}
    layers = []
    for row in FORMATS.values():
        for scale_type in row.scale_types:
            for zero_type in row.zero_types:
                for n, k in [(70, 128), (33, 100)]:  # 100: short groups, or blocks that cross row ends
                    layer = f"{row.name}.{scale_type.name}.{zero_type.name}.{k}"
                    weight = make_weight(row.name, n, k, scale_type=scale_type, zero_type=zero_type)
                    tensors[f"{layer}.weight"] = weight
                    if dtype := biases[len(layers) % len(biases)]:
                        tensors[f"{layer}.bias"] = torch.linspace(-3, 3, n).to(dtype)
                    layers.append(layer)
    checkpoint.save(path, tensors)
    return layers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A checkpoint and its layers."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    return path, write_checkpoint(path)


# Package


def test_c_consumer(consumers: Path) -> None:
    result = run(consumers / "c_consumer")
    assert result.returncode == 0, result.stderr


def test_cpp_consumer(consumers: Path) -> None:
    result = run(consumers / "cpp_consumer")
    assert result.returncode == 0, result.stderr


def test_programs_need_neither_torch_nor_python(cpp_server: Path) -> None:
    libraries = run("ldd", cpp_server).stdout
    assert "libcutlass_ext.so => " in libraries
    assert "not found" not in libraries
    assert not re.search(r"\b(libtorch|libpython|libc10)", libraries)


def test_package_may_be_moved_but_not_be_incomplete(tmp_path: Path) -> None:
    prefix, source, build_folder = tmp_path / "prefix", ROOT / "tests" / "cpp", tmp_path / "build"
    for folder in ("lib", "include"):
        shutil.copytree(cmake_prefix() / folder, prefix / folder)
    assert configure(source, build_folder, prefix).returncode == 0
    for missing in ("lib/libcutlass_ext.so", "include/cutlass_ext/cutlass_ext.hpp"):
        content = (prefix / missing).read_bytes()
        (prefix / missing).unlink()
        result = configure(source, build_folder, prefix)
        (prefix / missing).write_bytes(content)
        assert result.returncode != 0
        message = " ".join(result.stderr.split())
        assert "is incomplete" in message
        assert missing in message


@pytest.mark.parametrize(("version", "accepted"), [("0.1", True), ("0.2", False), ("1.0", False)])
def test_config_version(tmp_path: Path, version: str, accepted: bool) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(version_check LANGUAGES CXX)\n"
        f"find_package(cutlass_ext {version} CONFIG REQUIRED)\n"
    )
    assert (configure(tmp_path, tmp_path / "build", cmake_prefix()).returncode == 0) == accepted


# Server


class Server:
    """A running server process."""

    def __init__(self, program: Path, file: Path, socket_path: Path, *options: object) -> None:
        self.path = socket_path
        command = [program, "--file", file, "--socket", socket_path, "--threads", 3, *options]
        self.process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        connection.connect(str(self.path))
        return connection

    def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(by)
        return self.process.wait(30)


@pytest.fixture
def start(cpp_server: Path, model: tuple[Path, list[str]]) -> Iterator[Callable[..., Server]]:
    """Starts servers of the model; kills what a failed test leaves."""
    folder = Path(tempfile.mkdtemp(prefix="cx"))  # a socket's path has at most 107 bytes
    servers: list[Server] = []

    def start_server(*options: object) -> Server:
        servers.append(Server(cpp_server, model[0], folder / f"{len(servers)}.sock", *options))
        return servers[-1]

    yield start_server
    for server in servers:
        server.process.kill()
        server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
    shutil.rmtree(folder)


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        assert part, f"expected {count} bytes, got the end after {len(data)}"
        data += part
    return data


def request_bytes(layer: str, x: np.ndarray) -> bytes:
    name = layer.encode()
    header = b"CXGM" + struct.pack("<I", len(name)) + name + struct.pack("<II", *x.shape)
    return header + x.astype("<f4").tobytes()


def read_reply(connection: socket.socket) -> tuple[int, np.ndarray | str]:
    """Status and y, or status and message."""
    status, m, n = struct.unpack("<III", receive(connection, 12))
    if status != OK:
        return status, receive(connection, m).decode()
    return status, np.frombuffer(receive(connection, 4 * m * n), "<f4").reshape(m, n)


def assert_serves(server: Server, model: tuple[Path, list[str]]) -> None:
    """A new connection gets a right answer."""
    layer = model[1][0]
    weights = checkpoint.load(model[0])
    dense = weights[f"{layer}.weight"].dequantize(torch.float32).double().numpy()
    x = np.random.default_rng(0).standard_normal((2, dense.shape[1]), dtype=np.float32)
    expected = x.astype(np.float64) @ dense.T
    if f"{layer}.bias" in weights:
        expected += weights[f"{layer}.bias"].double().numpy()
    with server.connect() as connection:
        connection.sendall(request_bytes(layer, x))
        status, y = read_reply(connection)
    assert status == OK
    assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)


def test_lists_layers(cpp_server: Path, model: tuple[Path, list[str]]) -> None:
    result = run(cpp_server, "--file", model[0])
    assert result.returncode == 0, result.stderr
    assert sorted(line.split(":")[0] for line in result.stdout.splitlines()) == sorted(model[1])


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, None])
def test_client_checks_every_layer(
    cpp_server: Path, model: tuple[Path, list[str]], start: Callable[..., Server], by: signal.Signals | None
) -> None:
    server = start()
    assert server.ready_line.startswith(f"ready: {len(model[1])} layers")
    client = [cpp_server, "--file", model[0], "--client", server.path]
    for m in (0, 1, 13):
        result = run(*client, "--m", m, "--connections", 5, "--requests", len(model[1]))
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.startswith("ok: ")
    if by is None:
        assert run(cpp_server, "--shutdown", server.path).returncode == 0
        assert server.process.wait(30) == 0
    else:
        assert server.stop(by) == 0
    assert not server.path.exists()


def test_client_notices_wrong_replies(
    cpp_server: Path, model: tuple[Path, list[str]], start: Callable[..., Server], tmp_path: Path
) -> None:
    """The client's reference is of another file than the server's weights."""
    other = {"nf4.FP32.NONE.128.weight": make_weight("nf4", 70, 128).map_tensors(lambda t: t.roll(1))}
    checkpoint.save(tmp_path / "other.safetensors", other)
    result = run(cpp_server, "--file", tmp_path / "other.safetensors", "--client", start().path)
    assert result.returncode == 1
    assert result.stdout.startswith("MISMATCH")


def test_bad_requests_are_refused_and_the_server_goes_on(
    model: tuple[Path, list[str]], start: Callable[..., Server]
) -> None:
    server = start("--max-mib", 1)
    layer = "nf4.FP32.NONE.128"
    x = np.ones((1, 128), dtype=np.float32)

    def header(magic: bytes = b"CXGM", name_bytes: int = len(layer), m: int = 1, k: int = 128) -> bytes:
        return magic + struct.pack("<I", name_bytes) + layer.encode() + struct.pack("<II", m, k)

    closing = [
        (header(magic=b"HTTP"), BAD_REQUEST, "magic"),
        (header(name_bytes=1 << 31), BAD_REQUEST, "layer name"),
        (header(m=0xFFFFFFFF, k=0xFFFFFFFF), TOO_LARGE, "x: expected at most 1048576 bytes"),
        (header(m=1 << 20), TOO_LARGE, "x: expected at most 1048576 bytes"),
    ]
    for data, expected, part in closing:
        with server.connect() as connection:
            connection.sendall(data)
            status, message = read_reply(connection)
            assert (status, part in message) == (expected, True), message
            with suppress(ConnectionResetError):  # it closed before it had read all
                assert connection.recv(1) == b""
        assert_serves(server, model)

    with server.connect() as connection:  # these leave the connection open
        for data, expected, part in [
            (request_bytes("no.such.layer", x), UNKNOWN_LAYER, "no.such.layer"),
            (request_bytes("", x), UNKNOWN_LAYER, "''"),
            (request_bytes(layer, np.ones((2, 127))), WRONG_SHAPE, "K=128, got K=127"),
            (request_bytes("int8.FP32.NONE.100", np.ones((0, 7))), WRONG_SHAPE, "K=100, got K=7"),
        ]:
            connection.sendall(data)
            status, message = read_reply(connection)
            assert (status, part in message) == (expected, True), message
        connection.sendall(request_bytes(layer, x))
        assert read_reply(connection)[0] == OK
    assert_serves(server, model)


def test_truncated_requests(model: tuple[Path, list[str]], start: Callable[..., Server]) -> None:
    server = start()
    data = request_bytes("nf4.FP32.NONE.128", np.ones((1, 128)))
    for length in [0, 1, 4, 7, 8, 20, len(data) - 512, len(data) - 1]:
        with server.connect() as connection:
            connection.sendall(data[:length])
    assert_serves(server, model)


def test_silent_clients_hold_no_worker(model: tuple[Path, list[str]], start: Callable[..., Server]) -> None:
    server = start()
    silent = [server.connect() for _ in range(20)]  # more than workers
    assert_serves(server, model)
    for connection in silent:
        connection.close()
    assert server.stop() == 0


def test_stop_in_the_middle_of_a_request(start: Callable[..., Server]) -> None:
    server = start()
    with server.connect() as connection:
        connection.sendall(b"CXGM\x10\0\0\0half a name")
        assert server.stop() == 0


def test_socket_path(cpp_server: Path, model: tuple[Path, list[str]], start: Callable[..., Server]) -> None:
    server = start()
    assert server.path.stat().st_mode & 0o777 == 0o600
    second = run(cpp_server, "--file", model[0], "--socket", server.path)
    assert second.returncode == 1
    assert "Address already in use" in second.stderr
    server.process.kill()
    server.process.wait()
    assert server.path.exists()  # it could not clean up
    again = Server(cpp_server, model[0], server.path)
    assert_serves(again, model)
    assert again.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--bogus", "1"], "--bogus"),
        (["--socket"], "--socket: expected a value"),
        (["--socket", "/tmp/s"], "--file: expected a checkpoint"),
        (["--file", "f", "--socket", "/tmp/s", "--threads", "0"], "--threads: expected 1..1024, got '0'"),
    ],
)
def test_usage_errors(cpp_server: Path, arguments: list[str], part: str) -> None:
    result = run(cpp_server, *arguments)
    assert result.returncode == 2
    assert part in result.stderr


# Damaged files


def list_layers(program: Path, path: Path, data: bytes) -> Result:
    path.write_bytes(data)
    return run(program, "--file", path)


def assert_refused(result: Result, path: Path) -> None:
    assert result.returncode == 1, (result.returncode, result.stderr)
    assert result.stderr.startswith(f"cpp_server: {path}: ")


@pytest.fixture
def small_file(tmp_path: Path) -> bytes:
    weight = make_weight("nf4", 4, 64, nested=True)
    checkpoint.save(tmp_path / "small.safetensors", {"p.weight": weight, "p.bias": torch.ones(4)})
    return (tmp_path / "small.safetensors").read_bytes()


def each(program: Path, folder: Path, variants: list[bytes]) -> list[tuple[Result, Path]]:
    """The program's verdict on each variant of a file."""
    paths = [folder / f"{i}.safetensors" for i in range(len(variants))]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda item: list_layers(program, *item), zip(paths, variants, strict=True)))
    return list(zip(results, paths, strict=True))


def test_truncated_files(cpp_server: Path, small_file: bytes, tmp_path: Path) -> None:
    lengths = [*range(32), *range(32, len(small_file), 29), len(small_file) - 1]
    for result, path in each(cpp_server, tmp_path, [small_file[:length] for length in lengths]):
        assert_refused(result, path)
    assert_refused(list_layers(cpp_server, tmp_path / "long", small_file + b"\0"), tmp_path / "long")


@pytest.mark.parametrize("mask", [0x01, 0x10, 0xFF])
def test_flipped_header_bytes(cpp_server: Path, small_file: bytes, tmp_path: Path, mask: int) -> None:
    """A changed header is an error or a header that still makes sense (another name in the metadata)."""
    end = 8 + int.from_bytes(small_file[:8], "little")
    metadata_end = small_file.index(b"}", small_file.index(b"header_crc32"))
    positions = [*range(16), *range(16, metadata_end, 7), *range(metadata_end, end)]
    variants = [small_file[:i] + bytes([small_file[i] ^ mask]) + small_file[i + 1 :] for i in positions]
    refused = 0
    for result, path in each(cpp_server, tmp_path, variants):
        assert result.returncode in (0, 1), (result.returncode, result.stderr)
        if result.returncode == 1:
            assert_refused(result, path)
            refused += 1
    assert refused > len(variants) // 2


def test_flipped_quant_spec(cpp_server: Path, small_file: bytes, tmp_path: Path) -> None:
    spec = struct.pack("<7q", 1, FORMATS["nf4"].id, 6, 0, 64, 4, 64)
    assert small_file.count(spec) == 1
    start = small_file.index(spec)
    variants = [
        small_file[:i] + bytes([small_file[i] ^ mask]) + small_file[i + 1 :]
        for i in range(start, start + len(spec))
        for mask in (0x80, 0x04)
    ]
    for result, path in each(cpp_server, tmp_path, variants):
        assert_refused(result, path)
        assert "layer 'p': " in result.stderr


def safetensors_file(header: str, data_bytes: int) -> bytes:
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def one_tensor(dtype: str, shape: str, offsets: str, data_bytes: int) -> bytes:
    header = f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'
    return safetensors_file(header, data_bytes)


OVERLAP = """{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
              "b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"""

ORPHAN = '{"p.weight.codes":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "expected at least 8 bytes, got 0"),
        (b"\xff" * 64, "header length: expected at most 56"),
        (safetensors_file("[]", 0), "header byte 0: expected '{', got '['"),
        (safetensors_file("{}", 0), "expected a quantized layer"),
        (safetensors_file("{} x", 0), "expected the end, got 'x'"),
        (b"\x05" + bytes(7) + b'{"\xa0":', "header byte 2: expected UTF-8, got byte 0xa0"),
        (safetensors_file('{"a":{"dtype":"F32","shape":[2]}}', 8), "got no data_offsets"),
        (safetensors_file(OVERLAP, 6), "tensor 'b': data_offsets: expected [4, 6]"),
        (one_tensor("F32", "[1]", "[0,4]", 5), "data: expected 4 bytes"),
        (one_tensor("F32", "[-1]", "[0,4]", 4), "non-negative integer, got '-'"),
        (one_tensor("F32", "[1e1]", "[0,40]", 40), "expected ']', got 'e'"),
        (one_tensor("F32", "[2]", "[0,4]", 8), "expected [0, 8]"),
        (one_tensor("F32", "[2]", "[8,0]", 8), "expected [0, 8]"),
        (one_tensor("X9", "[2]", "[0,8]", 8), "got 'X9'"),
        (one_tensor("F32", "[4294967296,4294967296]", "[0,0]", 0), "fewer than 2^64 bytes"),
        (one_tensor("F32", "[99999999999999999999]", "[0,0]", 0), "below 2^63"),
        (safetensors_file(ORPHAN, 4), "'p.weight.quant_spec': expected beside 'p.weight.codes', got none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_malformed_headers(cpp_server: Path, tmp_path: Path, data: bytes, part: str) -> None:
    result = list_layers(cpp_server, tmp_path / "f", data)
    assert_refused(result, tmp_path / "f")
    assert part in result.stderr


def test_parts_that_do_not_fit(cpp_server: Path, tmp_path: Path) -> None:
    """Every tensor of a layer: missing, of another dtype, of another shape; and one too many."""
    state = make_weight("nf4", 4, 64, nested=True).state_dict("p.weight.")
    path = tmp_path / "f"

    def refused(tensors: dict[str, torch.Tensor], part: str) -> None:
        checkpoint.save(path, tensors)
        result = run(cpp_server, "--file", path)
        assert_refused(result, path)
        assert part in result.stderr, (part, result.stderr)

    checkpoint.save(path, state)
    assert run(cpp_server, "--file", path).returncode == 0
    for name, tensor in state.items():
        refused({k: t for k, t in state.items() if k != name}, name)
        refused(state | {name: tensor.double()}, name)
        refused(state | {name: torch.stack([tensor, tensor])}, name)
    refused(state | {"p.weight.zeros": state["p.weight.scales"]}, "zeros': expected none, got U8 [4, 1]")
    refused(state | {"p.permutation": torch.arange(64)}, "p.permutation': expected none (no act-order), got I64 [64]")
    refused(state | {"p.bias": torch.ones(5)}, "'p.bias': expected F32 [4], got F32 [5]")
    int8 = torch.ones(4, dtype=torch.int8)
    refused(state | {"p.bias": int8}, "'p.bias': expected F32, F16 or BF16 [4], got I8 [4]")


def test_missing_file(cpp_server: Path, tmp_path: Path) -> None:
    for path, part in [(tmp_path / "none", "No such file"), (tmp_path, "regular file")]:
        result = run(cpp_server, "--file", path)
        assert_refused(result, path)
        assert part in result.stderr
