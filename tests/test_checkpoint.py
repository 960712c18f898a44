"""checkpoint.py: what is read back, what is refused, and what a crash leaves."""

import contextlib
import json
import math
import os
import struct

import numpy as np
import pytest

from bottlenecked import checkpoint
from bottlenecked.checkpoint import check_weights, initial_weights, load_weights, save_checkpoint
from bottlenecked.config import CacheProcessorConfig

SHAPE = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 4, "num_query_heads": 2}
SMALL = {"processor_dim": 6, "processor_heads": 2, "processor_mlp_dim": 5}


def config(**changes):
    return CacheProcessorConfig(**{**SHAPE, **SMALL, **changes})


def random_weights(c, seed=0):
    generator = np.random.default_rng(seed)
    return {n: generator.normal(size=s).astype(np.float32) for n, s in c.tensor_shapes().items()}


def assert_same(weights, expected):
    assert list(weights) == list(expected)
    for name, tensor in weights.items():
        assert tensor.dtype == np.float32
        assert tensor.shape == expected[name].shape
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def write_raw(path, tensors):
    """A safetensors file by hand: name -> (dtype, shape, bytes)."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors.values()))


def raw(weights):
    return {n: ("F32", t.shape, t.astype("<f4").tobytes()) for n, t in weights.items()}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in a directory: (directory, config, weights)."""
    c = config(extra={"note": "kept"})
    weights = random_weights(c)
    save_checkpoint(tmp_path, c, weights)
    return tmp_path, c, weights


# --- what is read back


def test_round_trip(saved):
    directory, c, weights = saved
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert CacheProcessorConfig.load(directory) == c
    assert_same(load_weights(directory, c), weights)
    modes = {(directory / name).stat().st_mode for name in os.listdir(directory)}
    assert len(modes) == 1


def test_save_makes_the_directory_and_leaves_other_files_alone(tmp_path):
    directory = tmp_path / "a" / "b"
    save_checkpoint(directory, config(), random_weights(config()))
    (directory / "README.md").write_text("mine")
    save_checkpoint(directory, config(top_k=1), random_weights(config(), seed=1))
    assert (directory / "README.md").read_text() == "mine"
    assert CacheProcessorConfig.load(directory).top_k == 1
    assert_same(load_weights(directory, config()), random_weights(config(), seed=1))


def test_save_converts_to_float32_in_the_order_of_the_table(tmp_path):
    c = config()
    weights = {n: np.array(t, np.float64, order="F") for n, t in reversed(random_weights(c).items())}
    save_checkpoint(tmp_path, c, weights)
    assert_same(load_weights(tmp_path, c), random_weights(c))


def test_half_precisions_are_widened_exactly(saved):
    directory, c, weights = saved
    tensors, expected = {}, {}
    for i, (name, tensor) in enumerate(weights.items()):
        if i % 3 == 0:
            half = tensor.astype("<f2")
            tensors[name], expected[name] = ("F16", half.shape, half.tobytes()), half.astype(np.float32)
        elif i % 3 == 1:
            # bfloat16 is the upper half of a float32.
            bits = tensor.view(np.uint32) & np.uint32(0xFFFF0000)
            upper = (bits >> np.uint32(16)).astype("<u2")
            tensors[name], expected[name] = ("BF16", upper.shape, upper.tobytes()), bits.view(np.float32)
        else:
            tensors[name], expected[name] = raw({name: tensor})[name], tensor
    # The order in the file is nobody's business.
    write_raw(directory / "model.safetensors", dict(reversed(tensors.items())))
    assert_same(load_weights(directory, c), expected)


def test_a_symbolic_link_is_followed(saved, tmp_path):
    directory, c, weights = saved
    (directory / "model.safetensors").rename(directory / "blob")
    (directory / "model.safetensors").symlink_to("blob")
    assert_same(load_weights(directory, c), weights)
    # Saving replaces the link, not what it points to.
    blob = (directory / "blob").read_bytes()
    save_checkpoint(directory, c, random_weights(c, seed=1))
    assert (directory / "blob").read_bytes() == blob
    assert not (directory / "model.safetensors").is_symlink()


# --- what is refused


def refuse(directory, c, *words):
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        load_weights(directory, c)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_every_missing_tensor_is_named(saved):
    directory, c, weights = saved
    for name in weights:
        write_raw(directory / "model.safetensors", raw({n: t for n, t in weights.items() if n != name}))
        refuse(directory, c, f"'{name}' is missing")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "layers.2.gate", "layers.0.q_proj", "", "a" * 5000])
def test_an_unknown_tensor_is_named_and_goes_nowhere(saved, name):
    directory, c, weights = saved
    above = sorted(os.listdir(directory.parent))
    write_raw(directory / "model.safetensors", {**raw(weights), name: ("F32", (1,), bytes(4))})
    refuse(directory, c, f"tensor {name[:100]!r} is unknown")
    assert sorted(os.listdir(directory.parent)) == above
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


def test_a_misshapen_tensor_is_named(saved):
    directory, c, weights = saved
    for name, shape in {
        "layers.1.gate": (1,),
        "layers.0.q_proj.weight": (36,),
        "layers.1.in_proj.weight": (8, 6),
        "layers.0.down_proj.weight": (6, 4),
        "layers.0.out_proj.bias": (0,),
    }.items():
        tensors = {**raw(weights), name: ("F32", shape, bytes(4 * math.prod(shape)))}
        write_raw(directory / "model.safetensors", tensors)
        refuse(directory, c, name, f"has shape {list(shape)}", str(list(c.tensor_shapes()[name])))


@pytest.mark.parametrize(("dtype", "size"), [("F64", 8), ("I32", 4), ("F8_E4M3", 1), ("BOOL", 1)])
def test_another_dtype_is_named(saved, dtype, size):
    directory, c, weights = saved
    tensors = {**raw(weights), "layers.1.q_proj.bias": (dtype, (6,), bytes(6 * size))}
    write_raw(directory / "model.safetensors", tensors)
    refuse(directory, c, "layers.1.q_proj.bias", dtype, "F32, F16 or BF16")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(saved, value):
    directory, c, weights = saved
    weights["layers.1.up_proj.weight"][4, 5] = value
    write_raw(directory / "model.safetensors", raw(weights))
    refuse(directory, c, "layers.1.up_proj.weight", "NaN or an infinity")
    # The same in bfloat16.
    weights["layers.1.up_proj.weight"][4, 5] = 0
    upper = (np.full((5, 6), value, "<f4").view("<u4") >> 16).astype("<u2")
    tensors = {**raw(weights), "layers.1.up_proj.weight": ("BF16", (5, 6), upper.tobytes())}
    write_raw(directory / "model.safetensors", tensors)
    refuse(directory, c, "layers.1.up_proj.weight", "NaN or an infinity")


def test_a_truncated_file_is_refused(saved):
    directory, c, _ = saved
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for length in (
        0,
        1,
        7,
        8,
        9,
        8 + header - 1,
        8 + header,
        8 + header + 1,
        len(whole) // 2,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:length])
        refuse(directory, c, "truncated or damaged")
    path.write_bytes(whole + b"\0")
    refuse(directory, c, "truncated or damaged")


def test_a_damaged_header_is_refused(saved):
    directory, c, _ = saved
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for start in (
        struct.pack("<Q", 2**60) + whole[8:],
        struct.pack("<Q", 99_000_000) + whole[8:],
        whole[:8] + b"[" + whole[9:],
        whole[:40] + b"\xff" + whole[41:],
        whole.replace(b'"shape":[6,5]', b'"shape":[9,5]', 1),
        b"PK\x03\x04" + whole,
    ):
        assert start != whole
        path.write_bytes(start)
        refuse(directory, c, "truncated or damaged")


def test_what_is_no_file_is_refused(saved):
    directory, c, _ = saved
    path = directory / "model.safetensors"
    path.unlink()
    refuse(directory, c, "cannot be read")
    path.mkdir()
    refuse(directory, c, "not a regular file")
    path.rmdir()
    os.mkfifo(path)
    refuse(directory, c, "not a regular file")


def test_a_file_that_may_not_be_read_is_named(saved, monkeypatch):
    directory, c, _ = saved

    def forbidden(*_, **__):
        raise PermissionError("Permission denied (os error 13)")

    # Not by its mode: root may read everything.
    monkeypatch.setattr(checkpoint, "safe_open", forbidden)
    refuse(directory, c, "cannot be read", "Permission denied")


def test_an_unknown_version_is_refused(saved):
    directory, *_ = saved
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match=r"config\.json: format_version is 2"):
        CacheProcessorConfig.load(directory)


def test_a_configuration_that_does_not_fit_is_refused(saved):
    directory, *_ = saved
    refuse(directory, config(num_layers=4096), "'layers.2.input_norm.weight' is missing")
    refuse(directory, config(num_layers=1), "'layers.1.attn_norm.weight' is unknown")
    refuse(directory, config(processor_dim=65536, processor_heads=1), "layers.0.in_proj.weight", "65536")


@pytest.mark.parametrize("kind", ["missing", "unknown", "misshapen", "nan", "overflow", "integer"])
def test_bad_weights_are_refused_before_anything_is_written(saved, tmp_path, kind):
    directory, c, good = saved
    weights = {n: t.astype(np.float64) for n, t in good.items()}
    name = "layers.1.k_proj.weight"
    if kind == "missing":
        del weights[name]
    elif kind == "unknown":
        name = "../x"
        weights[name] = np.zeros(2)
    elif kind == "misshapen":
        weights[name] = np.zeros((6, 7))
    elif kind == "integer":
        weights[name] = np.zeros((6, 6), np.int64)
    else:
        weights[name][0, 0] = math.nan if kind == "nan" else 1e39
    with pytest.raises(ValueError, match=f"^weights: tensor '{name}'"):
        check_weights(c, weights)
    with pytest.raises(ValueError, match=f"^weights: tensor '{name}'"):
        save_checkpoint(directory, config(top_k=1), weights)
    assert CacheProcessorConfig.load(directory) == c
    assert_same(load_weights(directory, c), good)
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        save_checkpoint(directory / "new", config(training={"loss": math.nan}), good)
    assert not (directory / "new").exists()


# --- crashes


class Crash(BaseException):
    pass


class Machine:
    """Lets so many changes of the disk happen, then crashes, with half of the next one done or nothing."""

    def __init__(self, monkeypatch, changes, half):
        self.left, self.half = changes, half
        self.count = 0

        def change(happen, happen_half=None):
            def run(*args, **kwargs):
                self.count += 1
                if self.left == 0:
                    if self.half and happen_half is not None:
                        self.half = False
                        happen_half(*args)
                    raise Crash
                self.left -= 1
                return happen(*args, **kwargs)

            return run

        def half_a_text(path, text, **_):
            write_text(path, text[: len(text) // 2])

        def half_a_file(tensors, path):
            save_file(tensors, path)
            os.truncate(path, path.stat().st_size // 2)

        save_file, write_text = checkpoint.save_file, checkpoint.Path.write_text
        monkeypatch.setattr(checkpoint, "save_file", change(save_file, half_a_file))
        monkeypatch.setattr(checkpoint.Path, "write_text", change(write_text, half_a_text))
        for module, name in [(os, "replace"), (checkpoint.Path, "unlink"), (checkpoint.shutil, "copymode")]:
            monkeypatch.setattr(module, name, change(getattr(module, name)))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("leftover", [None, "uncommitted", "committed"])
@pytest.mark.parametrize("new", [config(top_k=7), config(processor_mlp_dim=9)], ids=["settings", "shapes"])
def test_a_crash_leaves_the_old_checkpoint_or_the_new_one(tmp_path, monkeypatch, new, leftover, half):
    old = config()
    versions = {c.to_json(): random_weights(c, seed) for seed, c in enumerate((old, new))}
    found = []
    for changes in range(100):
        directory = tmp_path / str(changes)
        save_checkpoint(directory, old, versions[old.to_json()])
        if leftover == "uncommitted":
            (directory / "model.safetensors.new").write_bytes(b"half a file")
            (directory / "config.json.new").write_text("{")
        elif leftover == "committed":
            (directory / "config.json").rename(directory / "config.json.new")
            (directory / "config.json").write_text("not the configuration of these weights")
        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            machine = Machine(patch, changes, half)
            save_checkpoint(directory, new, versions[new.to_json()])
        # What a reader finds, before anybody repairs anything.
        c = CacheProcessorConfig.load(directory)
        assert_same(load_weights(directory, c), versions[c.to_json()])
        found.append(c)
        # The next save works and cleans up.
        save_checkpoint(directory, old, versions[old.to_json()])
        assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
        assert CacheProcessorConfig.load(directory) == old
        if machine.count <= changes:
            break
    assert changes >= 5
    # First the old one, then the new one for good.
    switch = found.index(new)
    assert found == [old] * switch + [new] * (len(found) - switch)
    assert 0 < switch < len(found) - 1


def test_a_crash_of_the_first_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    c = config()
    with monkeypatch.context() as patch:
        # The two files are written and have one mode.
        Machine(patch, 3, half=False)
        with pytest.raises(Crash):
            save_checkpoint(tmp_path, c, random_weights(c))
    assert (tmp_path / "model.safetensors.new").exists()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        CacheProcessorConfig.load(tmp_path)


def test_everything_is_on_the_disk_before_it_gets_its_name(saved, monkeypatch):
    directory, c, weights = saved
    log = []
    replace, flush = os.replace, checkpoint._flush
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(f"{a.name} -> {b.name}"), replace(a, b)))
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (log.append(path.name), flush(path)))
    save_checkpoint(directory, c, weights)
    weights_at = log.index("model.safetensors.new -> model.safetensors")
    config_at = log.index("config.json.new -> config.json")
    written = log[:weights_at]
    assert written[-1] == directory.name
    assert {"model.safetensors.new", "config.json.new"} <= set(written)
    assert directory.name in log[weights_at:config_at]
    assert log[-1] == directory.name


def test_a_disk_that_refuses_leaves_the_old_checkpoint(saved, monkeypatch):
    directory, c, weights = saved
    before = {name: (directory / name).read_bytes() for name in os.listdir(directory)}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for owner, name in (
        (checkpoint, "save_file"),
        (checkpoint.Path, "write_text"),
        (checkpoint.shutil, "copymode"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(directory, config(top_k=1), random_weights(c, seed=1))
        assert {name: (directory / name).read_bytes() for name in os.listdir(directory)} == before
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        save_checkpoint(directory, config(top_k=1), weights)
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert CacheProcessorConfig.load(directory) == c


# --- weights to begin with


def test_initial_weights():
    c = config(processor_dim=128, head_dim=32)
    weights = initial_weights(c)
    assert_same(check_weights(c, weights), weights)
    for name, tensor in weights.items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        elif name.endswith((".bias", "out_proj.weight")):
            assert not tensor.any()
            assert not np.signbit(tensor).any()
        elif name.endswith(".gate"):
            assert tensor == -2
        else:
            # 600 or more normal numbers: five standard errors.
            assert abs(tensor.mean()) < 5 * 0.02 / math.sqrt(tensor.size)
            assert abs(tensor.std() / 0.02 - 1) < 5 / math.sqrt(2 * tensor.size)


def test_initial_weights_depend_on_seed_layer_and_scale_alone():
    c = config()
    first = initial_weights(c)
    assert_same(initial_weights(c, seed=0), first)
    assert not np.array_equal(initial_weights(c, seed=1)["layers.0.q_proj.weight"], first["layers.0.q_proj.weight"])
    assert not np.array_equal(first["layers.0.q_proj.weight"], first["layers.1.q_proj.weight"])
    assert not np.array_equal(first["layers.0.q_proj.weight"], first["layers.0.k_proj.weight"])
    one = initial_weights(config(num_layers=1))
    assert_same(one, {n: first[n] for n in one})
    scaled = initial_weights(c, random_scale=0.5)
    for name, tensor in scaled.items():
        if name.endswith("out_proj.weight"):
            assert 0.3 < tensor.std() < 0.7
        else:
            np.testing.assert_array_equal(tensor, first[name])


@pytest.mark.parametrize("options", [{"random_scale": -1.0}, {"random_scale": math.nan}, {"seed": -1}])
def test_initial_weights_refuses(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is "):
        initial_weights(config(), **options)
