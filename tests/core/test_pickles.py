"""The reader of foreign pickles: what torch.save wrote comes back equal, and nothing that a file names ever runs."""

import copyreg
import functools
import gc
import io
import json
import operator
import os
import pickle
import random
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers.paths import reference
from safetensors.torch import load_file

from xtuner.core.errors import CheckpointError
from xtuner.core.pickles import Opaque, load_tensors

# ---- making files -------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of function(*args), whatever they are."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


class Id:
    """Pickles as a persistent id."""

    def __init__(self, *pid):
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Id) else None


def dumps(value, protocol=2):
    out = io.BytesIO()
    Pickler(out, protocol).dump(value)
    return out.getvalue()


def write(path, code, storages=(), byteorder="little", compression=zipfile.ZIP_STORED, top="archive"):
    """A zip as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{top}/data.pkl", code)
        if byteorder:
            file.writestr(f"{top}/byteorder", byteorder)
        for key, data in enumerate(storages):
            file.writestr(f"{top}/data/{key}", data)
    return path


def tensor_call(size, stride, offset=0, length=6, dtype=torch.FloatStorage, key="0"):
    storage = Id("storage", dtype, key, "cpu", length)
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


SIX = struct.pack("<6f", *range(6))


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert ours.requires_grad == theirs.requires_grad
        assert bits(ours).equal(bits(theirs))
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert ours == theirs


def round_trip(path, value, **options):
    torch.save(value, path, **options)
    theirs = torch.load(path, weights_only=True) if options.get("pickle_protocol", 2) == 2 else value
    for mmap in (True, False):
        same(load_tensors(path, mmap=mmap), theirs)
    return load_tensors(path)


# ---- round trips --------------------------------------------------------------------------------------------------

NUMBERS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
NUMBERS += [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]
NUMBERS += [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]  # through rebuild_v3


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_all_dtypes(tmp_path, protocol):
    torch.manual_seed(0)
    value = {str(dtype): (torch.randn(3, 5) * 9).abs().to(dtype) for dtype in NUMBERS}
    round_trip(tmp_path / "a.bin", value, pickle_protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values(tmp_path, protocol):
    value = {
        "none": None, "flags": (True, False), "ints": [0, -1, 255, 65536, 2**31, -(2**63), 2**200], 3: 2.5,
        "text": "Grüße 中文", "long": "x" * 300, "bytes": [b"", b"\x00\xff", b"y" * 300],
        "sets": [set(), {1, 2}, {("a", 1)}], "size": torch.Size([2, 3]), "dtypes": [torch.bfloat16, torch.int64],
        "ordered": OrderedDict([("b", 1), ("a", [{}, [], ()])]), ("a", 1): 1, "deep": [[[[(1, (2, 3), 4, 5)]]]],
    }  # fmt: skip
    path = tmp_path / "a.pt"
    torch.save(value, path, pickle_protocol=protocol)
    same(load_tensors(path), value)
    value["frozen"] = frozenset({1, "a"})
    torch.save(value, path, pickle_protocol=protocol)
    same(load_tensors(path), value)


def test_a_state_dict_with_metadata(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).state_dict()
    assert state._metadata  # an attribute of the OrderedDict, written with BUILD
    ours = round_trip(tmp_path / "a.pth", state)
    assert vars(ours) == {}


def test_an_optimizer(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    round_trip(tmp_path / "a.pth", {"weight": weight, "optimizer": optimizer.state_dict()})


def test_parameters(tmp_path):
    odd = torch.nn.Parameter(torch.randn(2))
    odd.note = "kept by torch, left out here"  # goes through _rebuild_parameter_with_state
    torch.save([torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.arange(3), False), odd], tmp_path / "a")
    ours = load_tensors(tmp_path / "a")
    assert [type(p) for p in ours] == [torch.nn.Parameter] * 3
    assert [p.requires_grad for p in ours] == [True, False, True]
    assert ours[2].equal(odd)
    assert not hasattr(ours[2], "note")


class Subclass(torch.Tensor):
    pass


def test_tensors_with_attributes(tmp_path):
    """As DeepSpeed's ZeRO-3 gives them; the attributes are left out, and nothing else can be made that way."""
    odd = torch.arange(6.0).reshape(2, 3)
    odd.ds_id = "0_16"
    round_trip(tmp_path / "a.pt", [odd, odd[1]])
    assert not hasattr(load_tensors(tmp_path / "a.pt")[0], "ds_id")
    make, arguments = tensor_call((6,), (1,)).reduced
    typed = torch._tensor._rebuild_from_type_v2
    for call, words in (
        (Calls(typed, make, Subclass, arguments, {}), "refers to|of the class"),
        (Calls(typed, make, torch.Size, arguments, {}), "of the class"),
        (Calls(typed, make, "torch.Tensor", arguments, {}), "of the class"),
        (Calls(typed, typed, torch.Tensor, (make, torch.Tensor, arguments, {}), {}), "unknown constructor"),
        (Calls(typed, os.system, torch.Tensor, ("true",), {}), "system|unknown constructor"),
        (Calls(typed, make, torch.Tensor, list(arguments), {}), "unknown constructor"),
        (Calls(typed, make, torch.Tensor, (arguments[0], 0, (7,), (1,)), {}), "element 6 of a storage of 6"),
        (Calls(typed, make, torch.Tensor, arguments), "argument"),
        (Calls(torch.Tensor, 3), "a call of a _Class"),
    ):
        for opaque in (False, True):
            with pytest.raises(CheckpointError, match=words):
                load_tensors(write(tmp_path / "b.pt", dumps(call), [SIX]), opaque=opaque)


def test_views_share_their_storage(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    value = {"whole": whole, "row": whole[2], "column": whole[:, 1], "turned": whole.t(), "some": whole[::2, ::3]}
    value |= {"none": whole[:0], "end": whole.flatten()[24:], "one": torch.tensor(7.0), "wide": whole[0, 1].expand(5)}
    ours = round_trip(tmp_path / "a.bin", value)
    assert len({ours[name].untyped_storage().data_ptr() for name in ("whole", "row", "column", "turned", "wide")}) == 1
    ours["row"][0] = 100
    assert ours["whole"][2, 0] == 100


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at Linux's list of maps")
def test_the_file_is_mapped_as_long_as_a_tensor_lives_and_never_changed(tmp_path):
    path = tmp_path / "mapped.bin"
    torch.save({"a": torch.zeros(1 << 20), "b": torch.ones(3)}, path)
    before = path.read_bytes()

    def is_mapped():
        gc.collect()
        return str(path) in Path("/proc/self/maps").read_text()

    value = load_tensors(path)
    row = value.pop("a")[10:20]
    del value
    assert is_mapped()
    row += 1
    assert row.sum() == 10
    assert path.read_bytes() == before
    del row
    assert not is_mapped()
    value = load_tensors(path, mmap=False)
    assert not is_mapped()
    value["a"] += 1  # memory of its own
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux counts memory")
def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    if overcommit == "2":
        pytest.skip("this machine maps no more than it has memory")
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "small.pt")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open(tmp_path / "large.pt", "wb") as file:  # a hole in front of a zip file is part of none
            file.write(b"PK\3\4")
            file.seek(2 * memory // 4096 * 4096)
            file.write((tmp_path / "small.pt").read_bytes())
    except OSError:
        pytest.skip("this file system keeps no holes")
    value = load_tensors(tmp_path / "large.pt")
    assert value["a"].equal(torch.arange(1000.0))
    assert str(tmp_path / "large.pt") in Path("/proc/self/maps").read_text()


def test_other_layouts_of_the_zip(tmp_path):
    code = dumps({"a": tensor_call((2, 3), (3, 1))})
    want = torch.arange(6.0).reshape(2, 3)
    for name, options in {"no byteorder": {"byteorder": ""}, "any top folder": {"top": "model_states"}}.items():
        assert load_tensors(write(tmp_path / name, code, [SIX], **options))["a"].equal(want)
    # torch aligns storages to 64 bytes, zipfile does not: these are read instead of mapped where they lie askew
    for shift in range(8):
        path = write(tmp_path / f"shift{shift}", code, [SIX], top="x" * (shift + 1))
        assert load_tensors(path)["a"].equal(want)
    old = Calls(torch._utils._rebuild_tensor, Id("storage", torch.FloatStorage, "0", "cuda:3", 6), 0, (6,), (1,))
    assert load_tensors(write(tmp_path / "old", dumps(old), [SIX])).equal(torch.arange(6.0))
    untyped = tensor_call((24,), (1,), length=24, dtype=torch.UntypedStorage)
    assert load_tensors(write(tmp_path / "untyped", dumps(untyped), [SIX])).numpy().tobytes() == SIX


# ---- nothing runs -------------------------------------------------------------------------------------------------


class Setter:
    def __setstate__(self, state):
        Path(state["marker"]).touch()


class Appender(list):
    def extend(self, values):
        Path(values[0]).touch()

    append = extend


class Setting(dict):
    def __setitem__(self, key, value):
        Path(key).touch()


class Named:
    def __getnewargs_ex__(self):
        return (), {"marker": self.marker}

    def __new__(cls, marker=None):
        if marker:
            Path(marker).touch()
        return super().__new__(cls)


def bombs(marker, folder):
    """{name: pickle}: each makes the marker file when Python's own pickle reads it."""
    touch, python = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    system = Calls(os.system, touch)
    (folder / "hubconf.py").write_text(f"def make():\n    {python}\n")
    (folder / "surprise_on_import.py").write_text(f"{python}\nclass Thing: pass\n")
    inner = folder / "inner.pt"
    torch.save(system, inner)
    setter, setting, named = Setter(), Setting(), Named()
    setter.marker = named.marker = str(marker)
    dict.__setitem__(setting, str(marker), 1)
    method = dumps(Calls(getattr, Calls(Path, str(marker)), "touch"))[:-1]
    text = b"X" + struct.pack("<I", len(touch)) + touch.encode()
    return {
        "os.system": dumps(system),
        "eval": dumps(Calls(eval, python)),
        "exec": dumps(Calls(exec, python), 4),
        "__import__": dumps(Calls(eval, f"__import__('os').system({touch!r})"), 5),
        "in a dict": dumps({"state_dict": OrderedDict(a=[({"x": system},)])}),
        "as a key": dumps({"a": 1, system: 2}),
        "result of a call is called": method + b")R.",
        "methodcaller": dumps(Calls(list, Calls(map, operator.methodcaller("touch"), [Path(marker)]))),
        "partial": dumps(Calls(functools.partial(os.system, touch))),
        "map in a set": dumps(Calls(set, Calls(map, os.system, [touch]))),
        "map in an OrderedDict": dumps(Calls(OrderedDict, Calls(map, eval, [f"({python}, 1)"]))),
        "__setstate__": dumps(setter, 4),
        "extend": dumps(Appender([str(marker)])),
        "__setitem__": dumps(setting),
        "__new__ with keywords": dumps(named, 4),
        "torch.hub": dumps(Calls(torch.hub._load_local, str(folder), "make")),
        "torch.load": dumps(Calls(functools.partial(torch.load, weights_only=False), str(inner))),
        "storage type": dumps(Id("storage", system, "0", "cpu", 6)),
        "a module's import": b"\x80\x02csurprise_on_import\nThing\n.",
        "class of Python 2": b"(" + text + b"ios\nsystem\n.",
        "object of Python 2": b"(cos\nsystem\n" + text + b"o.",
        "dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + text + b"\x85R.",
        "extension registry": b"\x80\x02\x82\x77" + text + b"\x85R.",
        "extension registry, 4 bytes": b"\x80\x02\x84\x77\0\0\0" + text + b"\x85R.",
    }


class PlainPickle(pickle.Unpickler):
    def persistent_load(self, pid):
        return pid


@pytest.mark.processes
def test_no_bomb_goes_off(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.syspath_prepend(str(tmp_path))
    copyreg.add_extension("os", "system", 0x77)
    try:
        for name, code in bombs(marker, tmp_path).items():
            marker.unlink(missing_ok=True)
            sys.modules.pop("surprise_on_import", None)
            path = write(tmp_path / "bomb.pt", code, [SIX])
            for opaque in (False, True):
                try:
                    value = load_tensors(path, opaque=opaque)
                except CheckpointError:
                    value = None
                assert not marker.exists(), name
                assert opaque or value is None, name
            PlainPickle(io.BytesIO(code)).load()  # the control: it is a bomb
            assert marker.exists(), f"{name} is a dud"
    finally:
        copyreg.remove_extension("os", "system", 0x77)


def test_builders_cannot_be_changed(tmp_path):
    change = b"}(X\x04\0\0\0makeNX\x0c\0\0\0__defaults__Nub."
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"):
        for state in (change, b"N" + change[:-2] + b"\x86b."):  # attributes through __dict__, and through setattr
            for opaque in (False, True):
                with pytest.raises(CheckpointError, match="a state for"):
                    load_tensors(write(tmp_path / "a", b"\x80\x02" + target + state), opaque=opaque)
    round_trip(tmp_path / "a", {"x": torch.ones(2), "y": OrderedDict(a=1)})


def test_a_tensor_takes_no_state_and_no_items(tmp_path):
    tensor = dumps(tensor_call((6,), (1,)))[:-1]
    other = dumps(tensor_call((6,), (1,)))[2:-1]
    for tail in (b"(K\0(K\x06t(K\x01t" + other + b"tb.", b"K\0G\0\0\0\0\0\0\0\0s.", b"(K\x01\x90.", b"K\x01a."):
        with pytest.raises(CheckpointError, match=r"(on|for) a Tensor"):
            load_tensors(write(tmp_path / "a", tensor + tail, [SIX]))


def test_shadowing_attributes_of_a_dict(tmp_path):
    code = b"\x80\x02ccollections\nOrderedDict\n)R}(X\x05\0\0\0itemsK\x01X\x09\0\0\0__class__K\x02ub."
    assert list(load_tensors(write(tmp_path / "a", code)).items()) == []


# ---- placeholders -------------------------------------------------------------------------------------------------


def test_placeholders_keep_what_the_file_gives(tmp_path):
    setter, setting = Setter(), Setting()
    setter.weight = torch.ones(2)
    dict.__setitem__(setting, "k", torch.zeros(1))
    value = {"s": setter, "l": Appender([1, 2]), "d": setting, "c": Path, "p": Path("a")}
    torch.save(value, tmp_path / "a", pickle_protocol=4)
    ours = load_tensors(tmp_path / "a", opaque=True)
    assert all(type(value) is Opaque for value in ours.values())
    assert ours["s"].name == f"{__name__}.Setter"
    assert ours["s"].state["weight"].equal(torch.ones(2))
    assert ours["l"].items == [1, 2]
    assert ours["d"].items == ["k", torch.zeros(1)]
    assert ours["c"].args == ()
    assert ours["p"].args == ("a",)
    assert repr(ours["p"]).startswith("<opaque pathlib.")
    with pytest.raises(TypeError):
        ours["p"]()
    with pytest.raises(AttributeError):
        ours["p"].anything = 1


def test_a_refusal_says_what_where_why_and_what_to_do(tmp_path):
    path = write(tmp_path / "a.pth", dumps({"x": Calls(os.system, "true")}))
    with pytest.raises(CheckpointError) as e:
        load_tensors(path)
    assert f"{os.system.__module__}.system" in e.value.what
    assert str(path) in e.value.where
    assert "byte" in e.value.where
    assert "arbitrary code" in e.value.why
    assert "safetensors" in e.value.do


# ---- damage and tricks --------------------------------------------------------------------------------------------

BAD_TENSORS = {
    "too many rows": tensor_call((3, 3), (3, 1)),
    "stride": tensor_call((2, 3), (4, 1)),
    "offset": tensor_call((2, 3), (3, 1), offset=1),
    "empty, offset": tensor_call((0,), (1,), offset=7),
    "scalar, offset": tensor_call((), (), offset=6),
    "negative offset": tensor_call((1,), (1,), offset=-1),
    "negative stride": tensor_call((2,), (-1,), offset=3),
    "negative size": tensor_call((-2,), (1,)),
    "huge size": tensor_call((2**70,), (0,)),
    "product wraps to 0": tensor_call((2**32, 2**32), (0, 0)),
    "last element wraps": tensor_call((2, 2), (2**63 - 1, 2**63 - 1)),
    "ranks differ": tensor_call((2, 3), (1,)),
    "floats": tensor_call((2.0,), (1,)),
    "text": tensor_call("ab", "cd"),
    "storage shorter than said": tensor_call((7,), (1,), length=7),
    "negative storage": tensor_call((), (), length=-1),
    "another type's size": tensor_call((6,), (1,), dtype=torch.DoubleStorage),
    "no such storage": tensor_call((6,), (1,), key="1"),
    "outside of the folder": tensor_call((6,), (1,), key="../data.pkl"),
    "a storage that is none": Calls(torch._utils._rebuild_tensor_v2, [0.0] * 6, 0, (6,), (1,), False, OrderedDict()),
    "id of another kind": Id("module", torch.FloatStorage, "0", "cpu", 6),
    "id too short": Id("storage", torch.FloatStorage, "0"),
    "conjugated": Calls(*(lambda c: (c[0], *c[1], {"conj": True}))(tensor_call((6,), (1,)).reduced)),
    "hooks": Calls(*(lambda c: (c[0], *c[1][:5], {"hook": 1}))(tensor_call((6,), (1,)).reduced)),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, name):
    path = write(tmp_path / "a.pt", dumps([BAD_TENSORS[name]]), [SIX])
    for mmap in (True, False):
        with pytest.raises(CheckpointError) as e:
            load_tensors(path, mmap=mmap)
        assert str(path) in e.value.where


def test_other_formats_are_refused_with_words(tmp_path):
    def refused(path, words, **options):
        with pytest.raises(CheckpointError, match=words) as e:
            load_tensors(path, **options)
        assert str(path) in e.value.where

    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.bin").write_text("<!doctype html>")
    (tmp_path / "empty.bin").touch()
    code = dumps(tensor_call((6,), (1,)))
    refused(tmp_path / "legacy.pt", "before 1.6")
    refused(tmp_path / "bare.pkl", "bare pickle")
    refused(tmp_path / "lfs.bin", "git-lfs")
    refused(tmp_path / "page.bin", "begins with")
    refused(tmp_path / "empty.bin", "begins with")
    refused(tmp_path / "absent.bin", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")
    refused(write(tmp_path / "big.bin", code, [SIX], byteorder="big"), "big.*endian")
    refused(write(tmp_path / "packed.bin", code, [SIX], compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(write(tmp_path / "no_storage.bin", code), "no item named")
    refused(write(tmp_path / "quantized.bin", dumps({"dtype": torch.quint8})), "quint8")
    refused(write(tmp_path / "ends.bin", code[:-1], [SIX]), "STOP")
    refused(write(tmp_path / "text_id.bin", b"P0\n.", [SIX]), "PERSID")
    refused(write(tmp_path / "ext.bin", b"\x80\x02\x82\x01."), "EXT1", opaque=True)
    with zipfile.ZipFile(tmp_path / "wheel.zip", "w") as file:
        file.writestr("a/b.txt", "")
    refused(tmp_path / "wheel.zip", "data.pkl")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as file:
        file.writestr("a/data.pkl", code)
        file.writestr("b/data.pkl", code)
    refused(tmp_path / "two.zip", "2 members")


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    torch.save({"a": torch.ones(50), "b": torch.ones(3)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in range(0, len(whole), 13):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            load_tensors(tmp_path / "cut.pt")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damage_never_ends_in_anything_but_our_error(tmp_path):
    value = {"a": torch.ones(50), "b": OrderedDict(c=torch.nn.Parameter(torch.ones(3)), d={1, "x"}), "s": Setter()}
    value["s"].state = (1, 2.5, None, b"xy")
    rng = random.Random(0)
    for protocol in (2, 4):
        torch.save(value, tmp_path / "whole.pt", pickle_protocol=protocol)
        whole = bytearray((tmp_path / "whole.pt").read_bytes())
        pickled = whole.index(b"\x80")
        refused = 0
        for _ in range(1000):
            changed = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(pickled, pickled + 600)] = rng.randrange(256)
            (tmp_path / "changed.pt").write_bytes(changed)
            try:
                load_tensors(tmp_path / "changed.pt", opaque=rng.random() < 0.5)
            except CheckpointError:
                refused += 1
        assert refused > 500


def test_nesting_without_end(tmp_path):
    deep = 100_000
    load_tensors(write(tmp_path / "lists", b"\x80\x02" + b"]" * deep + b"a" * (deep - 1) + b"."))
    load_tensors(write(tmp_path / "tuples", b"\x80\x02)" + b"\x85" * deep + b"."))
    load_tensors(write(tmp_path / "opaque", b"\x80\x02ca\nb\n" + b")R" * deep + b"."), opaque=True)
    load_tensors(write(tmp_path / "states", b"\x80\x02" + b"ca\nb\n" * 5000 + b"b" * 4999 + b"."), opaque=True)
    with pytest.raises(CheckpointError, match="as a key"):  # hashing it would overflow the C stack
        load_tensors(write(tmp_path / "key", b"\x80\x02})" + b"\x85" * deep + b"Ns."))
    itself = load_tensors(write(tmp_path / "itself", b"\x80\x02]q\x00h\x00a."))
    assert itself[0] is itself


# ---- real checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture
def zero():
    return reference("zero_ckpt")


def test_all_reference_checkpoints(zero):
    files = [file for pattern in ("*.pt", "*.pth") for file in sorted(zero.rglob(pattern)) if file.is_file()]
    assert len(files) >= 11
    for file in files:
        value = load_tensors(file, opaque=True)
        assert isinstance(value, dict), file
        with pytest.raises(CheckpointError, match=r"mmengine|deepspeed"):
            load_tensors(file)


def test_a_single_file_of_xtuner(zero):
    info = json.loads((zero / "zero2_bf16_no_optimizer" / "info.json").read_text())
    value = load_tensors(zero / "zero2_bf16_no_optimizer" / "iter_3.pth", opaque=True)
    assert sorted(value) == info["top_keys"]
    state = value["state_dict"]
    assert list(state) == info["names"]
    assert {str(tensor.dtype) for tensor in state.values()} == set(info["dtypes"])
    assert sum(tensor.numel() for tensor in state.values()) == info["total_params"]


@pytest.mark.parametrize("stage", ["zero1_bf16_2ranks", "zero2_bf16_2ranks"])
def test_weights_and_masters_of_deepspeed(zero, stage):
    expected = load_file(zero / stage / "expected_fp32_state_dict.safetensors")
    folder = zero / stage / "iter_3.pth"
    module = load_tensors(folder / "mp_rank_00_model_states.pt", opaque=True)["module"]
    assert set(module) == set(expected)
    for name, tensor in module.items():
        assert tensor.equal(expected[name].bfloat16()), name
    flat = []
    for rank in (0, 1):
        states = load_tensors(folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", opaque=True)
        flat.append(states["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].detach())
    masters = torch.cat(flat)
    at = 0
    for name, tensor in module.items():
        assert masters[at : at + tensor.numel()].equal(expected[name].flatten()), name
        at += tensor.numel()
