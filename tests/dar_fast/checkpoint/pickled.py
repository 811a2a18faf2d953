"""The bytes of pickle opcodes, so that a test can write what no pickler would."""

import struct

P2 = b"\x80\x02"


def named(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(cls_name="FloatStorage", key="0", count=4, module="torch"):
    return (
        b"(" + text("storage") + named(module, cls_name) + text(key) + text("cpu")
        + number(count) + b"tQ"
    )  # fmt: skip


def tensor(size=(4,), stride=(1,), offset=0, **stored):
    return (
        named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage(**stored)
        + number(offset) + numbers(size) + numbers(stride) + b"\x89}tR"
    )  # fmt: skip
