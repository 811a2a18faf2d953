"""Pickles that ask for more than data: nothing runs or hangs, the error names what was refused."""

import struct

import pickled as op
import pytest
import torch

from dar_fast.checkpoint.errors import CheckpointError, Limits
from dar_fast.checkpoint.records import Record

CALLED = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"),
    ("subprocess", "check_output"), ("builtins", "eval"), ("builtins", "exec"),
    ("builtins", "open"),
    ("builtins", "compile"), ("builtins", "getattr"), ("builtins", "setattr"),
    ("builtins", "input"),
    ("builtins", "__import__"), ("builtins", "breakpoint"), ("__builtin__", "eval"),
    ("__builtin__", "execfile"), ("builtins", "object"), ("builtins", "type"), ("builtins", "map"),
    ("sys", "exit"), ("sys", "settrace"), ("importlib", "import_module"), ("runpy", "_run_code"),
    ("shutil", "rmtree"), ("socket", "create_connection"), ("ctypes", "CDLL"), ("pickle", "loads"),
    ("_pickle", "loads"), ("marshal", "loads"), ("functools", "partial"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"), ("types", "FunctionType"), ("types", "CodeType"),
    ("weakref", "finalize"), ("webbrowser", "open"), ("pty", "spawn"), ("timeit", "timeit"),
    ("cProfile", "run"), ("code", "interact"), ("bdb", "Bdb"), ("copyreg", "_reconstructor"),
    ("copyreg", "__newobj__"), ("copy_reg", "_reconstructor"), ("commands", "getoutput"),
    ("multiprocessing.util", "Finalize"), ("_posixsubprocess", "fork_exec"), ("imp", "load_source"),
    ("distutils.spawn", "spawn"), ("tempfile", "mktemp"), ("pathlib", "Path.unlink"),
    ("torch", "load"), ("torch", "compile"), ("torch.serialization", "load"), ("torch.hub", "load"),
    ("torch.jit", "load"), ("torch.storage", "_load_from_bytes"), ("torch", "from_file"),
    ("torch.nn.modules.linear", "Linear"), ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_wrapper_subclass"), ("torch.utils.cpp_extension", "load"),
    ("torch.fx.graph_module", "reduce_graph_module"), ("torch._inductor.codecache", "PyCodeCache"),
    ("numpy", "load"), ("numpy.testing._private.utils", "runstring"), ("numpy", "frombuffer"),
    ("pip", "main"), ("pip._internal", "main"), ("setuptools", "setup"), ("cloudpickle", "loads"),
    ("dill", "loads"), ("joblib", "load"), ("yaml", "unsafe_load"), ("pkg_resources", "run_script"),
    ("IPython", "embed"), ("somebody.code", "run"), ("somebody.code", "_private.run"),
    ("__main__", "run"), ("dar_fast.checkpoint.unpickler", "read_torch_file"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), CALLED, ids=lambda x: x)
def test_calling_is_refused_by_name(pack, read, module, name, tmp_path):
    marker = tmp_path / "ran"
    pickled = op.P2 + op.named(module, name) + op.text(f"touch {marker}") + b"\x85R."
    expected = f"{module}.{name}".replace("__builtin__", "builtins")
    with pytest.raises(CheckpointError, match=rf"refused .*{expected}"):
        read(pack(pickled))
    assert not marker.exists()


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda e: {"model": e}, lambda e: [[e]], lambda e: ((e, 1), 2),
        lambda e: {"args": {"x": e}},
        lambda e: __import__("argparse").Namespace(x=e),
        lambda e: __import__("collections").OrderedDict(a=e),
    ],
    ids=["dict", "list", "tuple", "nested", "namespace", "ordered"],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reduce_inside_containers(tmp_path, read, wrap, protocol):
    path = tmp_path / "evil.pt"
    torch.save(wrap(Evil()), path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"refused (posix|nt)\.system"):
        read(path)


def _cases():
    system = op.named("os", "system")
    space = op.named("argparse", "Namespace")
    return {
        "stack global": (op.text("os") + op.text("system") + b"\x93.", r"refused os\.system"),
        "stack global from memo": (
            op.text("system") + b"q\x000" + op.text("os") + b"h\x00\x93.", r"refused os\.system"),
        "stack global of numbers": (b"K\x01K\x02\x93.", "refused a name that is not a string"),
        "stack global of built name": (
            op.named("_codecs", "encode") + op.text("os") + op.text("latin1") + b"\x86R"
            + op.text("system") + b"\x93.", "refused a name that is not a string"),
        "dotted into globals": (
            op.text("collections") + op.text("OrderedDict.__init__.__globals__") + b"\x93.",
            r"refused collections\.OrderedDict\.__init__"),
        "dotted dunder": (
            op.text("somebody") + op.text("Class.__subclasses__") + b"\x93.", "__subclasses__"),
        "relative module": (op.text("..os") + op.text("system") + b"\x93.", "not a class name"),
        "name with a newline": (op.text("a\nb") + op.text("C") + b"\x93.", "not a class name"),
        "long name": (op.text("a" * 5000) + op.text("C") + b"\x93.", "characters"),
        "inst": (b"(" + op.text("x") + b"ios\nsystem\n.", r"opcode INST of os\.system"),
        "obj": (b"(" + space + op.text("x") + b"o.", r"opcode OBJ of argparse\.Namespace"),
        "ext1": (b"\x82\x01.", "refused opcode EXT1"),
        "ext2": (b"\x83\x01\x00.", "refused opcode EXT2"),
        "ext4": (b"\x84\x01\x00\x00\x00.", "refused opcode EXT4"),
        "newobj": (
            op.named("subprocess", "Popen") + op.text("ls") + b"\x85\x81.", r"subprocess\.Popen"),
        "newobj_ex": (
            op.named("subprocess", "Popen") + b")}" + op.text("args") + op.text("ls") + b"s\x92.",
            r"subprocess\.Popen"),
        "newobj_ex keywords": (space + b")]\x92.", "keyword arguments"),
        "newobj of a value": (op.text("x") + b")\x81.", "refused to instantiate a str"),
        "reduce of a value": (op.text("x") + b")R.", "refused to call a str"),
        "reduce of a record": (space + b")\x81)R.", "refused to call a Record"),
        "reduce with a list": (space + b"]R.", "arguments are a list"),
        "setstate of a class": (
            space + b"}" + op.text("__init__") + system + b"sb.", r"refused os\.system"),
        "build on a class": (space + b"}b.", r"refused to set the state of argparse\.Namespace"),
        "build on a tensor": (op.tensor() + b"}b.", "refused to set the state of Tensor"),
        "build on a dict": (b"}}b.", "refused to set the state of dict"),
        "tensor from a call": (
            op.named("torch._utils", "_rebuild_parameter") + system + b"\x85R.",
            r"refused os\.system"),
        "tensor subclass": (
            op.named("torch._tensor", "_rebuild_from_type_v2")
            + b"(" + op.named("torch._utils", "_rebuild_tensor_v2")
            + op.named("somebody", "Tensor") + b")}tR.",
            r"refused tensor subclass somebody\.Tensor"),
        "defaultdict factory": (
            op.named("collections", "defaultdict") + system + b"\x85R.", r"refused os\.system"),
        "text persistent id": (b"P0\n.", "refused opcode PERSID"),
        "text int": (b"I1\n.", "refused opcode INT"),
        "text string": (b"S'x'\n.", "refused opcode STRING"),
        "buffer": (b"\x97.", "refused opcode NEXT_BUFFER"),
        "read-only buffer": (b"\x98.", "refused opcode READONLY_BUFFER"),
        "unknown opcode": (b"\xff.", "refused opcode 0xff"),
        "protocol 6": (b"\x80\x06N.", "protocol 2 to 5, got 6"),
        "protocol 1": (b"\x80\x01N.", "protocol 2 to 5, got 1"),
        "tuple as key": (b"}N\x85Ns.", "dictionary key of type tuple"),
        "huge integer as key": (b"}" + op.number(1 << 61) + b"Ns.", "dictionary key of type int"),
        "list as key": (b"}]Ns.", "dictionary key of type list"),
        "list in a set": (b"\x8f(]\x90.", "dictionary key of type list"),
        "bytes of a size": (
            op.named("builtins", "bytes") + op.number(1 << 40) + b"\x85R.", "bad arguments"),
        "append to a dict": (b"}Na.", "appended to a dict"),
        "items on a list": (b"]NNs.", "items set on a list"),
        "add to a list": (b"](N\x90.", "added to a list"),
        "odd items": (b"}(Nu.", "without a value"),
        "empty memo": (b"h\x07.", "memo 7 is empty"),
        "nothing to pop": (b"0.", "finds nothing"),
        "nothing to call": (b"R.", "finds nothing"),
        "nothing to end": (b".", "unfinished"),
        "open mark at the end": (b"N(.", "unfinished"),
        "two values at the end": (b"NN.", "unfinished"),
        "no end": (b"N", "has no end"),
        "not UTF-8": (b"X\x01\x00\x00\x00\xff.", "damaged: BINUNICODE"),
        "string of 2 GiB": (b"X\xff\xff\xff\x7f.", "string of 2147483647 bytes"),
        "string of 2^63": (b"\x8d" + struct.pack("<Q", 1 << 63) + b".", "string of"),
        "bytearray of 2^40": (b"\x96" + struct.pack("<Q", 1 << 40) + b".", "string of"),
        "integer of 1 GiB": (b"\x8b\x00\x00\x00\x40.", "integer of 1073741824 bytes"),
        "integer of -1 bytes": (b"\x8b\xff\xff\xff\xff.", "integer of -1 bytes"),
        "frame of 2^60": (b"\x95" + struct.pack("<Q", 1 << 60) + b"N.", "frame is longer"),
        "name without end": (b"c" + b"a" * 600, "name that does not end"),
    }  # fmt: skip


CASES = _cases()


@pytest.mark.parametrize("case", CASES)
def test_crafted_opcodes(pack, read, case):
    body, message = CASES[case]
    with pytest.raises(CheckpointError, match=message):
        read(pack(op.P2 + body))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cls_name": "Popen", "module": "subprocess"}, r"refused subprocess\.Popen"),
        ({"cls_name": "Tensor"}, r"refused storage class torch\.Tensor"),
        ({"key": "../data.pkl"}, "refused storage key"),
        ({"key": "0/../../x"}, "refused storage key"),
        ({"key": "\u0660"}, "refused storage key"),
        ({"key": "7"}, "storage data/7 is not in the archive"),
        ({"count": 5}, "declared 5 elements of 4 bytes, got 16"),
        ({"count": -4}, "declared -4 elements"),
        ({"count": 1 << 62}, "declared 4611686018427387904 elements"),
        ({"cls_name": "UntypedStorage", "module": "torch.storage", "count": 16}, "without a dtype"),
        ({"size": (5,)}, "outside its storage"),
        ({"offset": 1}, "outside its storage"),
        ({"offset": 1 << 60}, "expected integers >= 0"),
        ({"offset": -1}, "expected integers >= 0"),
        ({"size": (-4,)}, "expected integers >= 0"),
        ({"stride": (-1,)}, "expected integers >= 0"),
        ({"stride": (2,)}, "outside its storage"),
        ({"size": (1 << 40,), "stride": (0,)}, "outside its storage"),
        ({"size": (1 << 40, 1 << 40), "stride": (0, 0)}, "outside its storage"),
        ({"size": (2, 2)}, "2 sizes and 1 strides"),
        ({"size": (1,) * 17, "stride": (1,) * 17}, "tuple of <= 16"),
    ],
    ids=str,
)
def test_views_stay_in_their_storage(pack, read, options, message):
    with pytest.raises(CheckpointError, match=message):
        read(pack(op.P2 + op.tensor(**options) + b"."))


@pytest.mark.parametrize("persistent", [b"N", b"K\x00", b")", b"](NNNNNtaN"], ids=repr)
def test_other_persistent_ids(pack, read, persistent):
    with pytest.raises(CheckpointError, match="refused persistent id"):
        read(pack(op.P2 + persistent + b"Q."))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"(" * 100_000 + b"N.", "nested deeper"),
        (b"N" + b"\x85" * 500_000 + b".", "nested deeper"),
        (b"]" * 5000 + b"a" * 4999 + b".", "nested deeper"),
        (b"N" * 1_100_000, "more than 1000000 opcodes"),
        (b"](" + b"N" * 20_000 + b"eq\x00" + b"cbuiltins\nlist\nh\x00\x85R" * 500 + b".", "copies"),
        (b"N" + b"\x94" * 600_000 + b".", "memo of more than"),
        (b"N" * (32 << 20), "pickle larger than"),
    ],
    ids=["marks", "tuples", "lists", "opcodes", "copies", "memo", "size"],
)
def test_bombs(pack, read, body, message):
    with pytest.raises(CheckpointError, match=message):
        read(pack(op.P2 + body))


def test_billion_laughs_stay_small_and_do_not_unfold(pack, read):
    laughs = b"](NNe" + b"".join(
        b"q" + bytes([i]) + b"0](" + (b"h" + bytes([i])) * 10 + b"e" for i in range(30)
    )
    space = op.named("argparse", "Namespace") + b")\x81}" + op.text("x")
    record = read(pack(op.P2 + space + laughs + b"sb."))
    with pytest.raises(CheckpointError, match="more than 200000 values"):
        record.plain()


def test_a_record_that_holds_itself(pack, read):
    loop = op.named("argparse", "Namespace") + b")\x81q\x00}" + op.text("x") + b"h\x00sb."
    record = read(pack(op.P2 + loop))
    assert record.state["x"] is record
    with pytest.raises(CheckpointError, match="refers to itself"):
        record.plain()


def test_truncated_everywhere(pack, read):
    body = op.P2 + b"}" + op.text("w") + op.tensor() + b"s."
    assert torch.equal(read(pack(body))["w"], torch.zeros(4))
    for length in range(len(body)):
        with pytest.raises(CheckpointError):
            read(pack(body[:length]))


def test_flipped_bits_of_the_pickle(tmp_path, read, pack):
    """A thousand flips behind a fresh checksum: inert values or a CheckpointError, nothing else."""
    import argparse
    import random
    import zipfile

    path = tmp_path / "valid.pt"
    model = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"model": model, "args": argparse.Namespace(lr=0.1, name="x")}, path)
    with zipfile.ZipFile(path) as archive:
        members = {n.split("/", 1)[1]: archive.read(n) for n in archive.namelist()}
    draw, outcomes = random.Random(7), {"refused": 0, "read": 0}
    for _ in range(1000):
        flipped = bytearray(members["data.pkl"])
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        try:
            read(pack(members | {"data.pkl": bytes(flipped)}))
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 300, outcomes


def test_limits_are_the_callers(pack, read):
    path = pack(op.P2 + b"](NNNNe.")
    assert read(path) == [None] * 4
    with pytest.raises(CheckpointError, match="more than 5 opcodes"):
        read(path, limits=Limits(opcodes=5))


def test_other_classes_are_inert(pack, read):
    body = (
        op.named("somebody.config", "Config")
        + op.text("a")
        + b"\x85R}"
        + op.text("k")
        + b"K\x01sb."
    )
    record = read(pack(op.P2 + body))
    assert isinstance(record, Record)
    assert (record.module, record.name, record.args) == ("somebody.config", "Config", ("a",))
    assert record.plain() == {"k": 1}
    assert repr(record) == "Record(somebody.config.Config)"
