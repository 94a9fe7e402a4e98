"""Read, convert and serve robot episodes; own every file that the project writes.

    python data.py --dataset_name bridge_v2 --output_dir ./data                download and convert
    python data.py --dataset_name bridge_v2 --output_dir ./data --source DIR   convert what is here
    python data.py --inspect ./data/bridge_v2                                  look at the result

    shard or folder --read--> episode --convert--> NNNNNNNNN.safetensors --EpisodeDataset--> clip

In this order: errors, files, processes, pictures; episode files; public data sets; the toy world;
converting; clips; runs; looking at what was converted.

frames   (T, H, W, 3) or (V, T, H, W, 3)   float32 in [0, 1]
actions  (T, A)                            action[t] drives frame t to frame t + 1
Sources: RLDS (Ramos et al. 2021, arXiv 2111.02767), Bridge V2 (Walke et al. 2023, arXiv
2308.12952), Open X-Embodiment (arXiv 2310.08864), released code of arXiv 2605.06388.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import textwrap
import threading
import time
import urllib.request
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from inspect import getdoc, getsource
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.utils.data
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# --- Errors, files, processes, pictures: everyone may import this section.


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_PLACE = [getattr(errno, e) for e in "EACCES EPERM EROFS ENOTDIR EISDIR EEXIST EFBIG".split()]
DISK_REMEDIES = dict.fromkeys(DISK_FULL, "; free space, run again")
DISK_REMEDIES |= dict.fromkeys(NO_PLACE, "; mend its permissions or name another place")
PLAIN_TYPES = {"str", "bool", "int", "float", "None"}  # of a config's fields, checked when read
PARSE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # damaged text


class InputError(ValueError):
    """Report a fault in what the user typed or in a file, in one sentence: what, where, remedy."""


class MissingFileError(InputError, FileNotFoundError):
    """Report a file or folder that is not there."""


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's `main`; print our errors and the disk's without a traceback, exit code 2."""
    try:
        main()
    except (InputError, OSError) as error:
        remedy = DISK_REMEDIES.get(getattr(error, "errno", None), "")
        if not (remedy or isinstance(error, InputError)):
            raise
        print(f"error: {error}{remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def show_flags(config: Any) -> None:
    """Print a config's flags by group; for each its value and its comment in the source."""
    cls = config if isinstance(config, type) else type(config)
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    for line in "".join(map(getsource, bases)).splitlines():
        if line.startswith("    # -- "):
            print(f"\n{line[9:]}")
        found = re.fullmatch(r"    (\w+): (.*?)(?: = .*?)?(?:  # (.*))?", line)
        if not found or found[1] not in cls.__dataclass_fields__:
            continue
        name, kind, comment = found.groups()
        value = getattr(config, name, cls.__dataclass_fields__[name].default_factory)
        if dataclasses.is_dataclass(value):  # nested
            show_flags(value)
            continue
        value = "(must be given)" if value is dataclasses.MISSING else value
        flag = f"  --{name} {'' if value in (None, '', ()) else value}"
        if choices := re.findall(r"[\"'](\w+)[\"']", kind):
            comment += f" ({' | '.join(choices)})"
        width = max(80, shutil.get_terminal_size().columns)
        print(textwrap.fill(f"{flag:41} {comment}", width, subsequent_indent=" " * 42))


def parse_args(cls: type, toy: Any = None, default: Any = None) -> Any:
    """Parse the command line with tyro; a first word `toy` puts `toy` in the defaults' place."""
    import tyro

    words = [{"true": "True", "false": "False"}.get(word, word) for word in sys.argv[1:]]
    if toy is not None and words[:1] == ["toy"]:
        words, default = words[1:], default or toy  # of a run that is resumed, its own
    if {"-h", "--help"} & {*words}:
        about = getdoc(cls)  # of a dataclass without its own: its signature
        try:
            print(about if about.endswith(".") else getdoc(sys.modules[cls.__module__]))
            show_flags(default or cls)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    flags = (tyro.conf.FlagConversionOff,)
    return tyro.cli(cls, args=words, default=default, use_underscores=True, config=flags)


def write_atomic(path: str | Path, write: bytes | Callable[[Path], Any]) -> None:
    """Write beside `path` (bytes, or by a function of a path), fsync, rename: all or nothing."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary) if callable(write) else temporary.write_bytes(write)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # of a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write a safetensors file atomically; `metadata` is any JSON value, read by `load_tensors`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, serialize_tensors(tensors, {"metadata": json.dumps(metadata)}))


@contextlib.contextmanager
def reading(path: str | Path, remedy: str, *faults: type) -> Iterator[None]:
    """Turn what goes wrong while a file is read into an InputError that names it."""
    if not Path(path).is_file():
        fault = "a folder" if Path(path).is_dir() else "no such file"
        raise MissingFileError(f"{path}: {fault}; check the path")
    try:
        yield
    except InputError:
        raise
    except faults as error:
        text = re.sub("\x1b.*?m", "", str(error))  # torch colours its words
        name, (said, *_) = type(error).__name__, [*text.splitlines(), ""]
        reason = f"{name}: {said.partition('. ')[0]}" if said else name
        raise InputError(f"{path}: truncated or of another format ({reason}); {remedy}") from error


@contextlib.contextmanager
def open_tensors(
    path: str | Path,
    framework: str = "pt",
    device: Any = "cpu",
    remedy: str = "copy or write it again",
) -> Iterator[tuple]:
    """Open a safetensors file of ours: (file, metadata); what goes wrong becomes an InputError."""
    with reading(path, remedy, SafetensorError, OSError, *PARSE_ERRORS):
        with safe_open(str(path), framework=framework, device=str(device)) as file:
            yield file, dict(json.loads((file.metadata() or {}).get("metadata", "{}")))


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict, dict]:
    """Read a safetensors file: ({name: tensor}, our metadata or {})."""
    with open_tensors(path, device=device) as (file, metadata):
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def check_zip(path: str | Path) -> bool:
    """Compare the checksums in a zip archive, as torch does not; tell whether it is one."""
    with reading(path, remedy := "fetch or write it again", Exception):
        if zipped := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise InputError(f"{path}: the checksum of {broken} does not match; {remedy}")
        return zipped


def load_torch(path: str | Path) -> Any:
    """Read a `.pt` file on the CPU, without ever running code in it; its checksums must match."""
    remedy = "a file that needs code to run is refused; otherwise fetch or write it again"
    with reading(path, remedy, Exception):  # of pickle and torch: they name no types
        zipped = check_zip(path)  # older files are none, and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def load_weights(path: str | Path) -> tuple[Any, dict]:
    """Read a file of ours or a released `.pt`: (state, our metadata or {})."""
    ours = Path(path).suffix == ".safetensors"
    return load_tensors(path) if ours else (load_torch(path), {})


def strip_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    """Remove what torch.compile and DDP put in front of every key, once or more."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in state.items()}


def load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Copy `state` into `module`; other names or shapes are an InputError that names them."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        faults = "; ".join(line.strip()[:160] for line in str(error).splitlines()[1:4])
        raise InputError(
            f"{where}: tensors do not fit {type(module).__name__}: {faults}; "
            "choose the file or the options that belong together"
        ) from error


def config_from(cls: type, values: dict, where: str) -> Any:
    """Build a config dataclass from stored values; unknown or ill-typed fields are refused."""
    fields = getattr(cls, "__dataclass_fields__", {})
    try:
        for name in values.keys() & fields.keys():
            kinds, value = {*fields[name].type.split(" | ")}, values[name]
            fits = {"None" if value is None else type(value).__name__}
            fits |= {"float"} if type(value) is int else set()
            if kinds <= PLAIN_TYPES and not kinds & fits:
                raise TypeError(f"{name} is {value!r}, not {fields[name].type}")
        return cls(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: {error}; take the version or the options it fits") from error


def rebuild(make: Callable, config: dict, state: dict, where: str) -> torch.nn.Module:
    """Make a stored module, in eval mode; no memory is taken before its shapes agree."""
    with torch.device("meta"):
        module = config_from(make, config, where)
    if wrong := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise InputError(f"{where}: {wrong[0]} holds no real numbers; copy the file again")
    load_strictly(module, {name: tensor.to("meta") for name, tensor in state.items()}, where)
    load_strictly(module.to_empty(device="cpu"), state, where)
    return module.eval()


class Processes(NamedTuple):
    """This process among all that torchrun started."""

    rank: int
    world_size: int
    device: torch.device
    patient: Any = None  # a gloo group of all, for what may last: it waits for days

    def barrier(self) -> None:
        """Wait for all, however slow one is; collectives of other groups time out meanwhile."""
        if self.world_size > 1:
            torch.distributed.barrier(self.patient)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all, on the device."""
        if self.world_size > 1:
            x = x.to(self.device)
            torch.distributed.all_reduce(x)
        return x

    def all_gather(self, x: Any) -> list:
        """Give every process what each of them has, however slow one is."""
        parts = [x] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(parts, x, self.patient)
        return parts

    def any(self, mine: bool) -> bool:
        """Tell whether it is so in any process; the device is not waited for."""
        votes = torch.tensor(float(mine))
        if self.world_size > 1:
            torch.distributed.all_reduce(votes, group=self.patient)
        return votes.item() > 0

    def cleanup(self) -> None:
        """Leave the group when all are done."""
        if self.world_size > 1:
            self.barrier()
            torch.distributed.destroy_process_group()


def open_device(name: str | torch.device) -> torch.device:
    """Return a device, tried; one that is not here is an InputError."""
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} cannot be used ({reason}); try cpu") from error


def init_processes(device: str | None = None, timeout_minutes: float = 60) -> Processes:
    """Join the process group when torchrun started us (NCCL on CUDA, gloo elsewhere)."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in names)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = open_device(f"cuda:{local_rank}" if name == "cuda" else name)
    if where.type == "mps":
        raise InputError("device mps: it lacks float64, which statistics need; give --device cpu")
    if where.type == "cpu" and sys.platform == "linux":  # keep freed memory: page faults are slow
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            getattr(libc, "mallopt", lambda *_: None)(option, value)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if world == 1:
        return Processes(rank, world, where)
    if not torch.distributed.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        backend = "nccl" if where.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timeout)
    days = datetime.timedelta(days=2)
    patient = torch.distributed.new_group(backend="gloo", timeout=days)
    return Processes(rank, world, where, patient)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x weight^T + bias; float32 on x86 by oneDNN, as MKL does not use AVX-512 on AMD."""
    kept = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    eager = not (kept or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
    if eager and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        if torch.backends.mkl.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def to_uint8(frames: torch.Tensor | np.ndarray) -> np.ndarray:
    """Turn frames in [0, 1] into bytes; uint8 passes through."""
    frames = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    if frames.dtype == np.uint8:
        return frames
    return (np.clip(frames.astype(np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)


def to_floats(frames: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Turn bytes into float32 in [0, 1]; other numbers become float32 as they are."""
    if isinstance(frames, np.ndarray) and frames.dtype == np.uint8:  # NumPy is faster at it
        return torch.from_numpy(np.divide(frames, 255, dtype=np.float32))
    frames = torch.as_tensor(frames)
    return frames / 255 if frames.dtype == torch.uint8 else frames.float()


def write_gif(path: str | Path, frames: torch.Tensor | np.ndarray, fps: float = 5) -> None:
    """Write an endless GIF of frames (T, H, W, 3) with one palette for all of them: no flicker."""
    frames = to_uint8(frames)
    assert frames.ndim == 4 and frames.shape[-1] == 3, frames.shape
    picked = Image.fromarray(np.concatenate(frames[:: max(1, len(frames) // 16)]))
    palette, flat = picked.quantize(256, Image.Quantize.FASTOCTREE), Image.Dither.NONE
    first, *others = [Image.fromarray(f).quantize(palette=palette, dither=flat) for f in frames]
    options = {"save_all": True, "append_images": others, "duration": 1000 / fps, "loop": 0}
    write_atomic(path, lambda temporary: first.save(temporary, "GIF", **options))


# --- Episode files: JPEG bytes of every view and frame, actions, metadata; and their index.

ACTION_DIM = 10  # xyz, rotation, gripper (-1 open, +1 closed), base (3; the last: "no action")
FILE = "{:09d}.safetensors"  # the name of an episode, by its number
REMEDY = "remove the folder of the data set and convert it again"
MEND = "mend the image or leave out its episode"


@contextlib.contextmanager
def open_frame(
    image: bytes | np.ndarray, where: str, remedy: str = REMEDY
) -> Iterator[Image.Image]:
    """Open a uint8 array (H, W, 3), or JPEG or PNG bytes; a Pillow error becomes an InputError."""
    try:
        if isinstance(image, bytes):
            opened = Image.open(io.BytesIO(image), formats=("JPEG", "PNG"))
        elif image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            opened = Image.fromarray(image)
        else:
            raise ValueError(f"{image.dtype} {image.shape}")
        if max(opened.size) > 4096:
            raise ValueError(f"{opened.size} pixels")
        yield opened
    except Exception as error:  # OSError, zlib.error, SyntaxError, ...: Pillow names no types
        reason = re.sub(r" <.*?>", "", str(error))
        fault = f"not a JPEG, PNG or uint8 (H, W, 3) image, or a broken one ({reason})"
        raise InputError(f"{where}: {fault}; {remedy}") from error


def decode_frame(
    image: bytes | np.ndarray, size: int | None, where: str, remedy: str = REMEDY
) -> np.ndarray:
    """Return an image as uint8 (H, W, 3), resized to `size` squared unless that is None."""
    with open_frame(image, where, remedy) as rgb:
        if rgb.mode.startswith("I"):  # 16 bits: Pillow would cut them off at 255
            rgb = Image.fromarray((np.asarray(rgb) >> 8).astype(np.uint8))
        rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
        if size and rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(rgb)


def encode_frame(image: bytes | np.ndarray, size: int | None, where: str) -> bytes:
    """Return JPEG bytes; a JPEG that has the size already passes through undecoded."""
    with open_frame(image, where, MEND) as opened:
        fits = size is None or opened.size == (size, size)
        if fits and (opened.format, opened.mode) == ("JPEG", "RGB"):
            return image
    encoded, rgb = io.BytesIO(), Image.fromarray(decode_frame(image, size, where, MEND))
    rgb.save(encoded, "JPEG", quality=95, subsampling=0)
    return encoded.getvalue()


def write_episode(
    path: str | Path, frames: Any, actions: np.ndarray, metadata: dict, size: int | None = None
) -> dict:
    """Write one episode to .../NNNNNNNNN.safetensors; return its entry for `append_index`.

    frames    (T,) or (V, T)  of JPEG or PNG bytes or uint8 (H, W, 3), as lists or an array
    actions   (T, 10)         finite
    metadata  language, success (True, False, None), fps, source; views: camera numbers if not 0...
    size      resize the frames unless they have this side already
    """
    frames, actions = list(frames), np.asarray(actions, np.float32)
    if frames and not isinstance(frames[0], (list, tuple)) and np.ndim(frames[0]) != 4:
        frames = [frames]
    T, counts = len(actions), sorted({len(view) for view in frames})
    if not T or counts != [T] or actions.shape != (T, ACTION_DIM) or not np.isfinite(actions).all():
        raise InputError(
            f"{path}: {counts} frames beside actions {actions.shape}, or an action is not finite; "
            f"give every frame one action of width {ACTION_DIM}"
        )
    jpegs = []
    for v, view in enumerate(frames):
        for t, image in enumerate(view):
            jpegs.append(encode_frame(image, size, f"{path}, view {v}, frame {t}"))
    metadata = {"language": "", "success": None, "views": list(range(len(frames))), **metadata}
    tensors = {
        "jpeg": torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8),
        "offsets": torch.tensor(np.cumsum([0, *map(len, jpegs)])),  # (V T + 1,), view by view
        "actions": torch.from_numpy(actions),
    }
    save_tensors(path, tensors, metadata)
    entry = {key: metadata[key] for key in ("views", "success", "language")}
    return {"number": int(Path(path).stem), "length": T, **entry}


class Episode:
    """One episode file, open: actions and metadata are read, frames only when asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open_tensors(path, "numpy") as (file, self.metadata):
            self.views = list(self.metadata["views"])
            self.actions, self.offsets = file.get_tensor("actions"), file.get_tensor("offsets")
            self.jpeg, ends = file.get_slice("jpeg"), self.offsets
            kinds = self.actions.dtype, ends.dtype, self.jpeg.get_dtype()
            sound = kinds == (np.float32, np.int64, "U8") and np.isfinite(self.actions).all()
            sound &= self.actions.shape[1:] == (ACTION_DIM,) and len(self.actions) > 0
            sound &= ends.shape == (len(self.views) * len(self.actions) + 1,) and ends[0] == 0
            if not (sound and (np.diff(ends) > 0).all() and [ends[-1]] == self.jpeg.get_shape()):
                raise ValueError("actions or frame offsets make no sense")

    def __len__(self) -> int:
        return len(self.actions)

    def jpeg_bytes(self, t: int, view: int = 0) -> bytes:
        """Read the JPEG of frame `t` of camera number `view`, and no other bytes."""
        if view not in self.views:
            raise InputError(f"{self.path}: has views {self.views}, not {view}; choose among them")
        row = self.views.index(view) * len(self) + int(t)
        return self.jpeg[int(self.offsets[row]) : int(self.offsets[row + 1])].tobytes()

    def frames(self, times: Iterable, views: Iterable, size: int | None) -> np.ndarray:
        """Decode frames to uint8 (V, T, H, W, 3)."""
        times, views, where = list(times), list(views), str(self.path)
        jpegs = [self.jpeg_bytes(t, view) for view, t in itertools.product(views, times)]
        frames = [decode_frame(jpeg, size, where) for jpeg in jpegs]
        if len({frame.shape for frame in frames}) > 1:
            raise InputError(f"{where}: its frames differ in size; {REMEDY} with one size")
        return np.stack(frames).reshape(len(views), len(times), *frames[0].shape)


def append_index(folder: str | Path, record: dict) -> None:
    """Commit episodes: add one JSON line to `folder/index.jsonl` and fsync.

    The first line describes the data set: dataset, fps, action_mapping, image_size. Every other
    line is a finished shard: shard, episodes {"train": [entries], "test": [entries]}, errors, ...
    A last line without newline was cut by a kill and counts as never written.
    """
    path = Path(folder) / "index.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_index(folder: str | Path) -> tuple[dict, list[dict], dict[str, list[dict]]]:
    """Read `folder/index.jsonl`: (description, a record each shard, episode entries by split)."""
    path, splits = Path(folder) / "index.jsonl", {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    if not lines:
        name, home = path.parent.name, path.parent.parent
        remedy = f"check the name, or convert it: data.py --dataset_name {name} --output_dir {home}"
        if name == "toy":
            remedy = f"remove its folder, if any: train_dit.py toy --dataset_dir {home} writes it"
        raise MissingFileError(f"{path}: no such data set; {remedy}")
    with reading(path, REMEDY, *PARSE_ERRORS):
        header, *records = map(json.loads, lines)
        records = list({record["shard"]: record for record in records}.values())
        for split, entries in [pair for r in records for pair in r["episodes"].items()]:
            splits.setdefault(split, []).extend(entries)
            for entry in entries:
                if type(entry["number"]) is not int or entry["length"] < 1 or not entry["views"]:
                    raise ValueError(f"entry {entry}")
        float(header["fps"]), str(header["action_mapping"])
        return header, records, {k: sorted(v, key=lambda e: e["number"]) for k, v in splits.items()}


# --- Public data sets: where they are, what their actions mean; RLDS is read without TensorFlow.

# fmt: off
ACTION_MAPPINGS = {  # clip(gain * (raw - mean), -limit, limit), numbers of arXiv 2605.06388's code
    # name: (gain of xyz, its limit, gain of rotation, its limit, gripper[, mean of xyz])
    "raw": (1.0, np.inf, 1.0, np.inf, "raw"),
    "bridge": (1.75 / 0.05, 1.74, 1.4 / 0.25, 1.39, "open"),  # 1 open, 0 closed -> -1, +1
    "bridge_policy": (1.75 / 0.05, 1.75, 1.4 / 0.25, 1.4, "policy"),  # above 0.8 open
    "libero": (1.75 / 1.0, 1.74, 1.4 / 0.4, 1.39, "raw"),
    "taco_play": (1.75 / 0.05, 1.74, 1.4 / 0.25, 1.39, "raw"),
    "jaco_play": ((1 / 0.12234575, 1 / 0.09676983, 1 / 0.11155209), np.inf, 1.0, np.inf, "raw",
                  (0.00096585, -0.00580069, -0.00395066)),
    "nyu_door": (20.0, np.inf, 15.0, np.inf, "raw"),
    "viola": (1.75, np.inf, 3.0, np.inf, "raw"),
    "autolab_ur5": (100.0, np.inf, 15.0, np.inf, "raw"),
    "toto": (2.0, np.inf, 1.0, np.inf, "raw"),  # gripper 1 = open, 0 = closed, as in that code
}


class Source(NamedTuple):
    """A public RLDS data set."""

    url: str
    gigabytes: int | None  # None: not known
    cameras: str  # image keys; the first is the main camera
    mapping: str
    fps: float
    language: str  # key of the instruction, in a step or in its observation
    success: str = ""  # key in episode_metadata, or "reward": that of the last step


RAIL, GCS = "https://rail.eecs.berkeley.edu/datasets/", "gs://gresearch/robotics/{}/0.1.0"
BRIDGE = RAIL + "bridge_release/data/tfds/bridge_dataset/1.0.0"
LIBERO = "https://huggingface.co/datasets/openvla/modified_libero_rlds/resolve/main/{}_no_noops/1.0.0"
TEXT, TEXT_OXE = "language_instruction", "natural_language_instruction"
SOURCES = {name: Source(url.format(name), *rest) for name, url, *rest in (
    ("bridge_v2", BRIDGE, 124, "image_0", "bridge", 5, TEXT, "reward"),
    ("bridge_v2_multiview", BRIDGE, 124, "image_0 image_1 image_2 image_3", "bridge", 5, TEXT,
     "reward"),
    ("soar", RAIL + "soar_release/1.0.0", None, "image_0", "bridge", 5, TEXT, "success"),
    ("bridge", GCS, 387, "image", "bridge", 5, TEXT_OXE),  # an older data set than bridge_v2
    ("rt_1", GCS.format("fractal20220817_data"), 111, "image", "raw", 3, TEXT_OXE, "reward"),
    ("taco_play", GCS, 48, "rgb_static", "taco_play", 15, TEXT_OXE),
    ("jaco_play", GCS, 9, "image", "jaco_play", 10, TEXT_OXE),
    ("berkeley_cable_routing", GCS, 5, "image", "raw", 10, TEXT_OXE),
    ("roboturk", GCS, 45, "front_rgb", "raw", 10, TEXT_OXE),
    ("nyu_door_opening_surprising_effectiveness", GCS, 7, "image", "nyu_door", 3, TEXT_OXE),
    ("viola", GCS, 10, "agentview_rgb", "viola", 20, TEXT_OXE),
    ("berkeley_autolab_ur5", GCS, 76, "image", "autolab_ur5", 5, TEXT_OXE),
    ("toto", GCS, 128, "image", "toto", 30, TEXT_OXE),
    *((f"libero_{suite}", LIBERO, None, "image", "libero", 20, TEXT, "reward")
      for suite in ("10", "object", "goal", "spatial")),
)}
# fmt: on
TARGETS = {"train": "train", "val": "test", "validation": "test", "test": "test"}
ACTION_SLICES = {"rotation_delta": slice(3, 6), "gripper_closedness_action": slice(6, 7)}
ACTION_SLICES |= {"open_gripper": slice(6, 7), "base_displacement_vector": slice(7, 9)}


def map_actions(raw: np.ndarray, mapping: str) -> np.ndarray:
    """Map a robot's actions (..., 7 to 10) to model units (..., 10); missing entries are 0."""
    raw = np.asarray(raw, np.float64)
    if mapping not in ACTION_MAPPINGS:
        raise InputError(f"action mapping {mapping!r}: use one of {', '.join(ACTION_MAPPINGS)}")
    if not raw.ndim or not 7 <= raw.shape[-1] <= ACTION_DIM:
        raise InputError(f"actions are {raw.shape}; the last axis must have 7 to {ACTION_DIM}")
    if not np.isfinite(raw).all():
        raise InputError("actions are not finite; mend or leave out their episode")
    gain, limit, turn_gain, turn_limit, gripper, mean = (*ACTION_MAPPINGS[mapping], 0.0)[:6]
    out = np.zeros((*raw.shape[:-1], ACTION_DIM), np.float32)
    out[..., : raw.shape[-1]] = raw
    out[..., :3] = np.clip((raw[..., :3] - mean) * gain, -limit, limit)
    out[..., 3:6] = np.clip(raw[..., 3:6] * turn_gain, -turn_limit, turn_limit)
    if gripper != "raw":
        out[..., 6] = 1 - 2 * (raw[..., 6] > 0.8 if gripper == "policy" else np.round(raw[..., 6]))
    return out


def null_action(actions: torch.Tensor) -> torch.Tensor:
    """Give "no action" for all actions (..., A): zeros, but the last entry, its flag, is 1."""
    null = torch.zeros_like(actions)
    null[..., -1] = 1
    return null


def raw_action(action: Any) -> np.ndarray:
    """Flatten one step's action, a vector or a dict of parts, to at most 10 numbers.

    The last entry, a base rotation in RT-1, stays 0: it is the models' "no action" flag.
    """
    if isinstance(action, dict) and "rel_actions_world" in action:
        action = action["rel_actions_world"]
    if not isinstance(action, dict):
        return np.asarray(action, np.float32)
    flat = np.zeros(ACTION_DIM, np.float32)
    flat[:3] = action["world_vector"]
    for name in action.keys() & ACTION_SLICES.keys():
        flat[ACTION_SLICES[name]] = np.ravel(action[name])
    return flat


def unpack_example(example: dict, source: Source) -> tuple[list, np.ndarray, dict]:
    """Take the frames of the cameras that are there, raw actions and metadata out of an episode.

    A camera is missing where its flag has_<camera> says so, or, without a flag, where it is black.
    """
    steps, about, frames = list(example["steps"]), example.get("episode_metadata", {}), {}
    for view, camera in enumerate(source.cameras.split()):
        images = [step["observation"][camera] for step in steps]
        if (there := about.get(f"has_{camera}")) is None:
            there = not view or decode_frame(images[0], None, camera, MEND).max() > 15
        if there:
            frames[view] = images
    if 0 not in frames:
        raise InputError(f"the main camera of {source.cameras!r} is missing")
    said = {**steps[0], **steps[0]["observation"]}
    text = next((said[key] for key in (source.language, TEXT, TEXT_OXE) if key in said), b"")
    success = {**about, "reward": steps[-1].get("reward")}.get(source.success)
    metadata = {
        "views": [*frames],
        "language": text.decode(errors="replace"),
        "success": None if success is None else bool(success > 0.5),
        "file": about.get("file_path", b"").decode(errors="replace"),
    }
    return [*frames.values()], np.stack([raw_action(step["action"]) for step in steps]), metadata


FOUR_ZEROS = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
for _ in range(32):  # what four zero bytes do to each byte of a CRC's state, bit by bit
    FOUR_ZEROS = FOUR_ZEROS >> 1 ^ (FOUR_ZEROS & 1) * np.uint32(0x82F63B78)


def pass_zeros(states: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Return CRC states behind as many zero bytes as the table `zeros` (4, 256) stands for."""
    a, b, c, d = np.moveaxis(states[..., None].view(np.uint8), -1, 0)
    return zeros[0].take(a) ^ zeros[1].take(b) ^ zeros[2].take(c) ^ zeros[3].take(d)


def masked_crc32c(message: bytes) -> int:
    """Compute TFRecord's checksum: neighbours are joined in pairs, all pairs at once.

    The state is linear: that of "ab" is b's plus what len(b) zeros make of a's, byte by byte; a
    table passed through itself stands for twice its zeros. Leading zeros do nothing, and the four
    bytes put first lead to the start state 0xFFFFFFFF.        [RFC 3720, 12.1; vectors in B.4]
    """
    words = np.frombuffer(bytes(-len(message) % 4) + b"\x54\x64\x1f\x64" + message, np.uint32)
    zeros = FOUR_ZEROS
    while len(words) > 1:
        words = np.append(np.zeros(len(words) % 2, np.uint32), words)
        words = pass_zeros(words[::2], zeros) ^ words[1::2]
        zeros = pass_zeros(zeros, zeros)
    crc = int(pass_zeros(words, FOUR_ZEROS)[0]) ^ 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def load_rlds(folder: Path, source: Source) -> tuple[Any, Any, list[str]]:
    """Load an RLDS description: tfds' info, decoders that leave images as bytes, feature names."""
    import tensorflow_datasets as tfds

    schema, about = folder / "features.json", folder / "dataset_info.json"

    def refuse_foreign(node: dict) -> None:  # loading the schema would import it
        for name in (node.get("pythonClassName"), node.get("type")):
            if isinstance(name, str) and not name.startswith("tensorflow_datasets."):
                raise InputError(f"{schema}: class {name} is not from RLDS; refused")

    def skip_images(node: Any) -> Any:
        node = node.feature if isinstance(node, tfds.features.Dataset) else node
        if isinstance(node, tfds.features.Image):
            return tfds.decode.SkipDecoding()
        if isinstance(node, tfds.features.FeaturesDict):
            return {name: found for name in node if (found := skip_images(node[name]))}

    with reading(schema, "fetch it again", Exception):  # of tfds and protobuf, which name no types
        json.loads(schema.read_text(), object_hook=refuse_foreign)
        features = tfds.features.FeatureConnector.from_config(str(folder))
        has = {*features["steps"].feature, *features["steps"].feature["observation"]}
        if missing := {"action", *source.cameras.split()} - has:
            raise InputError(f"{schema}: no feature {missing} in {has}; is this another data set?")
    with reading(about, "fetch it again", Exception):
        names = tfds.core.utils.flatten_nest_dict(features.get_serialized_info())
        return tfds.builder_from_directory(folder).info, skip_images(features), [*names]


def read_shard(path: Path, source: Source, rlds: tuple, check: bool) -> Iterator[Any]:
    """Yield (frames, raw actions, metadata) of every episode, or the InputError in its place.

    TFRecord: u64 length | its CRC | payload | its CRC. Behind a damaged length nothing is found.
    """
    (info, decoders, names), size = rlds, path.stat().st_size

    def broken(fault: str) -> InputError:
        return InputError(f"{path}: record at byte {at} {fault}; fetch the shard again")

    with open(path, "rb") as file:
        while (at := file.tell()) < size:
            header = file.read(12)
            length = int.from_bytes(header[:8], "little")
            sound = masked_crc32c(header[:8]).to_bytes(4, "little") == header[8:]
            if not sound or at + length + 16 > size:
                return (yield broken("is cut off" if sound else "has a damaged length"))
            payload, crc = file.read(length), int.from_bytes(file.read(4), "little")
            if check and masked_crc32c(payload) != crc:
                yield broken("has a wrong checksum")
                continue
            try:
                example = info.features.deserialize_example_np(payload, decoders=decoders)
                yield unpack_example(example, source)
            except InputError as error:
                yield error
            except Exception as error:  # of protobuf, tfds and NumPy, which name no types
                lost = [f"no {name}" for name in names if name.encode() not in payload]
                fault = ", ".join(lost) or repr(error)
                yield broken(f"does not match features.json ({fault})")


NPY_LOCK = threading.Lock()  # Python 3.11 cannot parse the headers of two arrays at once


def natural(path: Path) -> list:
    """Order names as people do: frame 9 before frame 10."""
    return [int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+)", path.name))]


def read_own(path: Path) -> Iterator[Any]:
    """Yield the one episode of an .npz file, or of a folder of images with actions.npy."""
    remedy = "an episode needs frames (T, H, W, 3) or (V, T, H, W, 3) and actions (T, 7 to 10)"
    known = {"language", "success", "fps"}
    array, about, found = path / "actions.npy", path / "metadata.json", {}
    try:  # of zip, zlib, tokenize, ...: NumPy names no types
        if path.is_file():
            with NPY_LOCK, reading(path, remedy, Exception), np.load(path) as file:
                frames, actions = file["frames"], file["actions"].astype(np.float64)
                if frames.ndim not in (4, 5):
                    raise ValueError(f"frames are {frames.shape}")
                found = {key: file[key].item() for key in known & {*file.files}}
        else:
            with NPY_LOCK, reading(array, remedy, Exception):
                actions = np.load(array).astype(np.float64)
            cameras = sorted((p for p in path.glob("[!.]*") if p.is_dir()), key=natural) or [path]
            names = [sorted(c.glob("[!.]*.[jJpP][pPnN]*[gG]"), key=natural) for c in cameras]
            frames = [[name.read_bytes() for name in view] for view in names]
            if about.exists():
                with reading(about, "mend or remove it", *PARSE_ERRORS):
                    said = json.loads(about.read_bytes())
                    found = {key: said[key] for key in known & said.keys()}
        found = {key: value for key, value in found.items() if value is not None}
        if isinstance(text := found.get("language", ""), bytes):
            found["language"] = text = text.decode(errors="replace")
        fps, success = found.get("fps", 1), found.get("success")
        sound = isinstance(fps, (int, float)) and 0 < fps < math.inf
        if not (sound and isinstance(text, str) and success in (None, False, True)):
            what = "language is text, success true or false, fps a positive number"
            raise InputError(f"{path}: {what}; mend {found}")
        yield frames, actions, found
    except InputError as error:
        yield error
    except OSError as error:
        yield InputError(f"{path}: an image cannot be read ({error}); mend or remove it")


# --- Toy world: a table, an arm with a gripper, blocks and a plate before three cameras. Metres and
# radians; x leads away from the arm, y to its left, z up; the table's top is z = 0. Quasi-static:
# blocks are pushed by the least planar move that frees them, a held one follows, others fall.

COLOURS = {  # sRGB; cyan belongs to the gripper's marker alone
    "cyan": (0, 214, 222), "red": (222, 40, 36), "green": (34, 168, 58), "blue": (36, 78, 226),
    "yellow": (236, 214, 16), "purple": (132, 44, 208), "pink": (236, 72, 172),
}  # fmt: skip
CAMERAS = (  # position, target, focal length in image heights
    (np.array([0.86, -0.40, 0.52]), np.array([0.25, 0.03, 0.095]), 1.40),
    (np.array([0.66, 0.58, 0.42]), np.array([0.264, -0.027, 0.09]), 1.33),
    (np.array([0.42, 0.00, 0.98]), np.array([0.28, 0.00, 0.0]), 1.68),
)
TOY_VERSION = 3  # of what the world does and looks like
WORKSPACE = np.array([[0.18, -0.17, 0.012], [0.42, 0.17, 0.19]])  # of the point between fingertips
MAX_MOVE = 0.0495  # of a policy, inside the bounds of the action mapping
EDGE, FINGER, GAP, LINK = 0.056, 0.075, 0.086, 0.27  # of a block, a finger, open fingers, the arm
UP, LIGHT = np.array([0, 0, 1.0]), np.array([0.27, -0.37, 0.89])
CORNERS = np.array([[k & 1, k >> 1 & 1, k >> 2 & 1] for k in range(8)]) * 2.0 - 1
FACES = np.array([list(map(int, face)) for face in "1375 2376 4576 0264 0154 0132".split()])
POLICIES = ("expert", "near_miss", "play", "random")


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Choose a toy world; the defaults are easy, the last group makes it out of distribution."""

    size: int = 64  # image side in pixels
    episodes: int = 300  # training episodes
    test_episodes: int = 32  # held-out episodes
    seed: int = 0  # of everything
    steps: tuple[int, int] = (24, 40)  # frames of the shortest and of the longest episode
    policies: tuple[float, ...] = (0.35, 0.2, 0.25, 0.2)  # shares: expert, near miss, play, random
    stack_share: float = 0.2  # goals "stack on a block"; the others are "put on the plate"
    noise: float = 0.012  # standard deviation added to a policy's moves (m)
    blocks: int = 3  # blocks, at most one of each colour
    # -- variation
    palette: tuple[str, ...] = ("red", "green", "blue")  # held out: yellow, purple, pink
    distractors: int = 0  # further blocks, grey and of other sizes
    camera_shift: float = 0.0  # degrees by which all cameras orbit the table
    camera_jitter: float = 0.0  # standard deviation of each camera's place, per episode (m)
    table_variation: float = 0.0  # 0 one wooden table .. 1 any tint and grain, per episode

    def __post_init__(self):
        known = set(self.palette) <= {*COLOURS} - {"cyan"} and self.distractors in range(5)
        if not known or not 1 <= self.blocks <= len({*self.palette}):
            raise InputError(f"toy palette {self.palette}: needs {self.blocks} of {[*COLOURS][1:]}")
        if not 2 <= self.steps[0] <= self.steps[1] or len(self.policies) != len(POLICIES):
            raise InputError(f"toy steps are (shortest, longest), policies shares of {POLICIES}")


def centroid(frames: np.ndarray, colour: str) -> np.ndarray:
    """Find a colour's centroid (..., 2) = (column, row) in frames (..., H, W, 3); NaN if absent.

    Weights fall linearly with the distance in chromaticity; the first pixel's centre is 0.5.
    """
    rgb, target = to_uint8(frames).astype(np.float32), 0.85 * np.array(COLOURS[colour])
    chroma = rgb / (rgb.sum(-1, keepdims=True) + 40)
    weight = np.linalg.norm(chroma - target / (target.sum() + 40), axis=-1)
    weight = np.clip(1 - weight / 0.15, 0, None)
    (H, W), total = weight.shape[-2:], weight.sum((-2, -1), keepdims=True)
    weight /= np.where(total > 8e-4 * H * W, total, np.nan)
    columns, rows = weight.sum(-2), weight.sum(-1)
    return np.stack([columns @ (np.arange(W) + 0.5), rows @ (np.arange(H) + 0.5)], -1)


def _axes(yaw: float) -> np.ndarray:
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def _overlap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Return the least move that frees b from a, None if apart: x, y, yaw, half length, width."""
    moves = []
    for angle in (a[2], a[2] + math.pi / 2, b[2], b[2] + math.pi / 2):
        c, s = math.cos(angle), math.sin(angle)
        along, reach = (b[0] - a[0]) * c + (b[1] - a[1]) * s, 0.0
        for _, _, yaw, length, width, *_ in (a, b):
            reach += length * abs(math.cos(angle - yaw)) + width * abs(math.sin(angle - yaw))
        if reach - abs(along) < 1e-9:
            return None
        depth = math.copysign(reach - abs(along), along)
        moves.append((abs(depth), depth * c, depth * s))
    return min(moves)[1:]


def _far_to_near(beyond: np.ndarray, seen: np.ndarray, pixels: np.ndarray) -> list[int]:
    """Sort boxes for painting: of two that meet in the image, a face plane between them decides.

    beyond (N, 6, N) how far box m is off a face of box n, seen (N, 6) faces, pixels (N, 8, 2)
    ->  indices of the boxes
    """
    face, gap = beyond.argmax(1), beyond.max(1)  # (N, N): the face best between n and m
    outside = np.take_along_axis(seen, face, 1)
    meet = (pixels.min(1)[:, None] < pixels.max(1)).all(-1)
    hides = np.where(gap >= gap.T, outside, ~outside.T) & meet & meet.T  # m may hide n
    hides = hides * np.exp(100 * np.minimum(np.maximum(gap, gap.T), 0))  # hardly, where they join
    order, left = [], hides.sum(0)
    for _ in seen:  # the box that hides no other one left; in a cycle, the least
        order.append(int(left.argmin()))
        left = left - hides[order[-1]]
        left[order[-1]] = np.inf
    return order


class ToyWorld:
    """Simulate and draw one world; all follows from the config, the seed and the actions.

    copy.deepcopy(world) saves its state: a copy can be stepped with other actions.

    gripper  (3,)    point between the fingertips; yaw: its turn; gap: between the fingers
    block    (N, 4)  centre and yaw of each block, the goal's first, distractors last
    held, hold       index of the held block or -1; its place as seen from the gripper
    """

    def __init__(self, config: ToyConfig, seed: int | Sequence[int] = 0):
        self.config, rng = config, np.random.default_rng(seed)
        self.names = rng.permutation(config.palette)[: config.blocks].tolist()
        self.names += [f"distractor{i}" for i in range(config.distractors)]
        count, edges = len(self.names), EDGE * rng.uniform(0.6, 1.1, len(self.names))
        self.half = np.where(np.arange(count) < config.blocks, EDGE, edges) / 2
        places, apart = [], 0.14
        while len(places) <= count:  # the plate and the blocks, apart from each other
            place = rng.uniform(WORKSPACE[0, :2] + 0.03, WORKSPACE[1, :2] - 0.03)
            if all(math.dist(place, other) > apart for other in places):
                places.append(place)
            apart *= 0.995
        self.plate, turns = np.append(places[0], 0), rng.uniform(-0.6, 0.6, count)
        self.block = np.column_stack([places[1:], self.half, turns])
        self.gripper = rng.uniform(WORKSPACE[0] + 0.08 * UP, WORKSPACE[1])
        self.yaw, self.gap, self.held, self.hold = float(rng.uniform(-0.5, 0.5)), GAP, -1, UP
        self.stack = bool(rng.random() < config.stack_share and config.blocks > 1)
        self.goal = f"put the {self.names[0]} block on the plate"
        if self.stack:
            self.goal = f"stack the {self.names[0]} block on the {self.names[1]} block"
        self.cameras, spin = [], _axes(-math.radians(config.camera_shift))
        for position, target, focal in CAMERAS:
            eye = spin @ (position - target) + target + config.camera_jitter * rng.normal(size=3)
            forward = (target - eye) / math.dist(target, eye)
            right = np.array([forward[1], -forward[0], 0]) / np.hypot(*forward[:2])
            self.cameras.append((eye, np.stack([right, np.cross(forward, right), forward]), focal))
        self.vary = config.table_variation * rng.uniform(-1, 1, 4)
        self._backgrounds = {}

    def positions(self) -> dict[str, np.ndarray]:
        """Return the place (3,) of the gripper, its cyan marker, the plate and every block."""
        places = {"gripper": self.gripper, "marker": self.gripper + (FINGER + 0.055) * UP}
        blocks = zip(self.names, self.block[:, :3].copy(), strict=True)
        return {**places, "plate": self.plate, **dict(blocks)}

    def project(self, points: np.ndarray, view: int = 0, size: int | None = None) -> np.ndarray:
        """Map points (..., 3) to (column, row) in a camera's image."""
        eye, axes, focal = self.cameras[view]
        local = (points - eye) @ axes.T
        return (local[..., :2] / local[..., 2:] * focal + 0.5) * (size or self.config.size)

    @property
    def success(self) -> bool:
        """Tell whether the goal's block rests, released, on the plate or on the other block."""
        support = self.block[1, :3] + self.half[1] * UP if self.stack else self.plate
        away = self.block[0, :3] - self.half[0] * UP - support
        return bool(self.held != 0 and np.hypot(*away[:2]) < EDGE and abs(away[2]) < 0.004)

    def _solids(self) -> list[tuple[float, ...]]:
        """List blocks, fingers, palm as (x, y, yaw, half length, half width, bottom, top)."""
        cubes = zip(self.block.tolist(), self.half.tolist(), strict=True)
        solids = [(x, y, yaw, h, h, z - h, z + h) for (x, y, z, yaw), h in cubes]
        (x, y, z), (dx, dy, _) = self.gripper.tolist(), _axes(self.yaw)[1] * (self.gap / 2 + 0.011)
        for k in (-1, 1):
            solids.append((x + k * dx, y + k * dy, self.yaw, 0.016, 0.011, z, z + FINGER))
        return [*solids, (x, y, self.yaw, 0.024, 0.07, z + FINGER, z + FINGER + 0.025)]

    def _settle(self) -> None:
        """Push loose blocks out of the gripper and of each other; let fall what has no support."""
        s, count, away = self._solids(), len(self.half), self.block[:, :2] - self.gripper[:2]
        away = np.hypot(*away.T) + 10 * self.block[:, 2].round(3)
        loose = sorted({*range(count)} - {self.held}, key=lambda i: away[i])
        for rank, i in [*enumerate(loose)] * 2:
            for j in (*range(count, count + 3), self.held, *loose[:rank]):  # held -1 is the palm
                a, b = s[j], s[i]
                move = _overlap(a, b) if min(a[6], b[6]) - max(a[5], b[5]) > 0.002 else None
                if move:
                    on = [k for k in loose if s[k][5] == b[6] and _overlap((*s[k][:2], 0, 0, 0), b)]
                    self.block[[i, *on], :2] += move  # with what stands on it
                    arm = np.clip(np.subtract(a[:2], b[:2]), -b[3], b[3])
                    self.block[i, 3] += (arm[0] * move[1] - arm[1] * move[0]) / (2 * b[3]) ** 2
                    s = self._solids()
        for i in sorted(loose, key=lambda i: self.block[i, 2]):
            s = self._solids()
            under = [b for b in s[:count] if b[5] < s[i][5] - 0.01]
            tops = [b[6] for b in under if _overlap((*s[i][:2], 0, 0, 0), b)]
            self.block[i, 2] = max([0.0, *tops]) + self.half[i]

    def step(self, action: Sequence[float]) -> None:
        """Apply a 7-D action: xyz move (m), roll, pitch (unused), yaw (rad), gripper (1 = open).

        The fingers open, or close and take hold of a block between them; then the arm moves, 6 mm
        at a time. It stops at the workspace's limits and on top of blocks.
        """
        action = np.asarray(action, np.float32).astype(float)
        if action[6] > 0.5:
            self.gap, self.held = GAP, -1
        elif self.gap == GAP:
            self.gap = 0.004
            for i, h in enumerate(self.half.tolist()):
                place = _axes(self.yaw) @ (self.block[i, :3] - self.gripper)
                if (np.abs(place) < (h, GAP / 2 - 0.6 * h, h)).all():
                    self.held, self.hold, self.gap = i, place * [1, 0, 1], 2 * h
        self._settle()
        move = np.clip(self.gripper + action[:3], *WORKSPACE) - self.gripper
        turn = np.clip(self.yaw + action[5], -math.pi / 2, math.pi / 2) - self.yaw
        count = max(1, math.ceil(np.abs(move).max() / 0.006))
        for part in np.tile(np.append(move, turn) / count, (count, 1)):
            blocks, hand = self._solids()[: len(self.half)], self._solids()[len(self.half) :]
            if self.held >= 0:
                hand.append(blocks.pop(self.held))
            for a in hand:
                tops = [b[6] for b in blocks if -0.002 < a[5] - b[6] < -part[2] and _overlap(a, b)]
                part[2] = max(part[2], max([0.0, *tops]) - a[5])
            self.gripper, self.yaw = self.gripper + part[:3], float(self.yaw + part[3])
            if self.held >= 0:
                self.block[self.held] = [*(self.gripper + self.hold @ _axes(self.yaw)), self.yaw]
            self._settle()

    def _boxes(self) -> list[np.ndarray]:
        """Return all boxes: centres (N, 3), axes (N, 3, 3), half sizes (N, 3), colours (N, 3)."""
        marker = self.positions()["marker"]
        radial, side, _ = arm = _axes(math.atan2(*self.gripper[1::-1]))
        shoulder, wrist = 0.15 * UP, marker - 0.055 * radial
        reach = wrist - shoulder
        bend = math.sqrt(LINK**2 / (reach @ reach) - 0.25)  # the elbow's height over that line
        elbow = shoulder + reach / 2 + bend * (UP * (reach @ radial) - radial * reach[2])
        parts = [(0.07 * UP, _axes(0), (0.06, 0.06, 0.07), (58, 60, 68))]
        parts.append((marker, arm, (0.034, 0.034, 0.03), COLOURS["cyan"]))
        for start, end, width in ((shoulder, elbow, 0.034), (elbow, wrist, 0.03)):
            axis = (end - start) / LINK
            axes = np.array([axis, side, UP * (axis @ radial) - radial * axis[2]])
            parts.append(((start + end) / 2, axes, (LINK / 2 + 0.012, width, width), (238,) * 3))
        colours = [COLOURS.get(name, (150, 146, 138)) for name in self.names]
        palm = (236, 236, 242) if self.gap == GAP else (62, 64, 72)  # bright while open
        colours += [(44, 46, 52), (44, 46, 52), palm]
        for (x, y, yaw, *half, low, high), rgb in zip(self._solids(), colours, strict=True):
            size = (*half, (high - low) / 2)
            parts.append((np.array([x, y, (low + high) / 2]), _axes(yaw), size, rgb))
        return [np.array(column) for column in zip(*parts, strict=True)]

    def _background(self, view: int, size: int) -> list[Image.Image]:
        """Return the empty table with the plate, lit and in shadow; painted once."""
        if (view, size) not in self._backgrounds:
            (eye, axes, focal), unit = self.cameras[view], (np.arange(size) + 0.5) / size - 0.5
            column, row = np.meshgrid(unit, unit)
            rays = np.stack([column, row, np.full_like(row, focal)], -1).astype(np.float32) @ axes
            x, y, _ = np.moveaxis(eye - eye[2] / rays[..., 2:] * rays, -1, 0).astype(np.float32)
            table = (rays[..., 2] < 0) & (np.abs(x - 0.20) < 0.46) & (np.abs(y) < 0.48)
            plank = np.floor(y / 0.085 + float(self.vary[3]))
            wave = np.sin(260 * y + 3 * np.sin(9 * x + 4 * np.sin(92 * plank)) + 7 * plank)
            wood = 1 + 0.07 * np.sin(2.4 * plank) + 0.035 * wave
            image = np.multiply.outer(wood, (1 + 0.35 * self.vary[:3]) * (186, 150, 92))
            for radius, colour in ((0.068, (250, 250, 250)), (0.05, (216, 220, 228))):
                image[np.hypot(x - self.plate[0], y - self.plate[1]) < radius] = colour
            image[~table] = 136, 152, 172
            both = image, np.where(table[..., None], 0.58 * image, image)
            both = [Image.fromarray(np.clip(i, 0, 255).astype(np.uint8)) for i in both]
            self._backgrounds[view, size] = both
        return self._backgrounds[view, size]

    def render(self, size: int | None = None, views: Iterable[int] = (0, 1, 2)) -> np.ndarray:
        """Draw what the cameras see, (V, size, size, 3) uint8: large, then averaged."""
        scale = 4 if (size or self.config.size) <= 64 else 2
        frames, side = [], (size or self.config.size) * scale
        centre, axes, half, colours = self._boxes()
        corners = centre[:, None] + np.einsum("ka,na,nad->nkd", CORNERS, half, axes)
        normals = np.concatenate([axes, -axes], 1)
        offset = np.einsum("nfd,nd->nf", normals, centre) + np.concatenate([half, half], 1)
        beyond = np.einsum("nfd,mkd->nfmk", normals, corners).min(-1) - offset[..., None]
        lit = normals @ LIGHT
        fill = (colours[:, None] * (0.52 + 0.48 * np.clip(lit, 0, 1))[..., None]).astype(int)
        fallen = corners - corners[..., 2:] / LIGHT[2] * LIGHT  # the corners' shadows
        for view in views:
            eye, (bright, dark) = self.cameras[view][0], self._background(view, side)
            shadows = self.project(fallen, view, side)[:, FACES].reshape(-1, 6, 8)[lit > 0]
            pixels, seen = self.project(corners, view, side), normals @ eye > offset
            image, mask = bright.copy(), Image.new("1", (side, side))
            draw, paint = ImageDraw.Draw(image), ImageDraw.Draw(mask)
            for shadow in shadows.tolist():
                paint.polygon(shadow, fill=1)
            image.paste(dark, mask=mask)
            for i in _far_to_near(beyond, seen, pixels):
                for face in np.flatnonzero(seen[i]):
                    polygon = pixels[i, FACES[face]].ravel().tolist()
                    draw.polygon(polygon, fill=tuple(fill[i, face].tolist()))
            frames.append(np.asarray(image.reduce(scale)))
        return np.stack(frames)


def toy_policy(world: ToyWorld, kind: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield 7-D actions that answer the world's present state; never ends. The hand does not turn.

    expert     fetch the goal's block, bring it to its place, then hover
    near_miss  the same with an error in grasp or place, or with another block
    play       seek contact: push blocks, carry them anywhere
    random     short flights in random directions

    On free flights the fingers open and close at random: what is rarely done is hard to learn.
    """
    rise, count = 0.09 * UP, len(world.names)

    def anywhere(low: float = 0.0) -> np.ndarray:
        return rng.uniform(WORKSPACE[0] + low * UP, WORKSPACE[1])

    def carry(i: int, support: np.ndarray, error: float | np.ndarray = 0.0) -> Iterator[tuple]:
        h = world.half[i]
        pick, put = world.block[i, :3] + error - 0.4 * h * UP, support + (0.6 * h + 0.004) * UP
        for place, free, before, after in ((pick, None, 1, 0), (put, 0, 0, 1)):
            yield place + rise, free, 14, 0.02
            yield place, before, 6, 0.008
            yield place + rise, after, 6, 0.04

    def push(i: int) -> Iterator[tuple]:
        run = 0.085 * _axes(rng.uniform(-math.pi, math.pi))[0]
        at = np.append(world.block[i, :2], 0.02)
        yield from [(at - run + rise, None, 6, 0.045), (at - run, 0, 4, 0.02)]
        yield at + run * rng.uniform(0.6, 1.5), 0, 4, 0.02
        yield at + run * 0.3 + rise, int(rng.integers(2)), 3, 0.045

    def waypoints() -> Iterator[tuple]:
        """Yield (place, gripper or None: any, most steps, distance at which it is reached)."""
        if kind in ("expert", "near_miss"):
            miss = int(rng.integers(1, 4 if count > 1 else 3)) if kind == "near_miss" else 0
            support = world.block[1, :3] + world.half[1] * UP if world.stack else world.plate
            error = rng.uniform(0.9, 1.3) * _axes(rng.uniform(-math.pi, math.pi))[0]
            which = int(rng.integers(1, count)) if miss == 3 else 0
            support = support + 0.09 * error * (miss == 2)
            yield from carry(which, support, 0.045 * error * (miss == 1))
        while kind in ("expert", "near_miss"):
            yield anywhere(0.12), None, 3, 0.045
        while kind == "play":
            i = int(rng.integers(count))
            yield from carry(i, anywhere() * [1, 1, 0]) if rng.random() < 0.4 else push(i)
        while True:
            yield anywhere(), None, int(rng.integers(1, 5)), 0.02

    for place, grip, steps, near in waypoints():
        goal, speed = np.clip(place, *WORKSPACE), rng.uniform(0.85, 1.0) * MAX_MOVE
        for _ in range(steps):
            miss = goal - world.gripper
            if steps > 1 and np.abs(miss).max() < near:
                break
            noise = rng.normal(0, world.config.noise, 3) * min(1, np.abs(miss).max() / 0.06)
            move = np.clip(np.clip(miss, -speed, speed) + noise, -MAX_MOVE, MAX_MOVE)
            move = np.clip(world.gripper + move, *WORKSPACE) - world.gripper
            fingers = int(rng.integers(2)) if grip is None else grip
            yield np.round([*move, 0, 0, 0, fingers], 5).astype(np.float32)


def toy_episode(config: ToyConfig, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Play one episode: frames (V, T, H, W, 3), actions (T, 10), metadata for `toy_state_at`."""
    world, rng = ToyWorld(config, seed), np.random.default_rng([*seed, 1])
    kind = str(rng.choice(POLICIES, p=np.array(config.policies) / sum(config.policies)))
    policy, frames, actions = toy_policy(world, kind, rng), [], []
    for _ in range(int(rng.integers(config.steps[0], config.steps[1] + 1))):
        if actions:
            world.step(actions[-1])
        frames.append(world.render())
        actions.append(next(policy))
    toy = {"config": dataclasses.asdict(config), "seed": [*seed], "policy": kind}
    toy["actions"] = np.round(np.array(actions, float), 5).tolist()
    meta = {"language": world.goal, "success": world.success, "fps": 5, "source": "toy", "toy": toy}
    return np.stack(frames, 1), map_actions(np.stack(actions), "bridge"), meta


def toy_state_at(metadata: dict, t: int) -> ToyWorld:
    """Rebuild the world of a stored episode as it stands in frame t."""
    toy = metadata["toy"]
    world = ToyWorld(config_from(ToyConfig, toy["config"], "toy episode"), toy["seed"])
    for action in toy["actions"][:t]:
        world.step(action)
    return world


def generate_toy(output_dir: str | Path, config: ToyConfig | None = None) -> Path:
    """Write <output_dir>/toy/{train,test}; a complete set stays, another config's is refused."""
    config, folder = config or ToyConfig(), Path(output_dir) / "toy"
    header = {"dataset": "toy", "fps": 5, "action_mapping": "bridge", "image_size": config.size}
    header["toy"] = json.loads(json.dumps({"version": TOY_VERSION, **dataclasses.asdict(config)}))
    if folder.exists():
        if read_index(folder)[0].get("toy") == header["toy"]:
            return folder
        raise InputError(f"{folder}: holds other toy episodes; remove it or choose another folder")
    partial = folder.with_name(".toy.partial")
    shutil.rmtree(partial, ignore_errors=True)
    entries = {"train": [], "test": []}
    for number, split, count in ((0, "train", config.episodes), (1, "test", config.test_episodes)):
        for i in tqdm(range(count), f"toy {split}", disable=None):
            episode = toy_episode(config, (config.seed, number, i))
            entries[split].append(write_episode(partial / split / FILE.format(i), *episode))
    append_index(partial, header)
    append_index(partial, {"shard": "toy", "episodes": entries})
    partial.rename(folder)
    return folder


# --- Converting: shards come from a folder or over HTTPS and become episode files.


@dataclasses.dataclass
class Args:
    """Download and convert robot data, or look at converted data.

    Public sets: bridge_v2, its authors' (124 GB), and bridge_v2_multiview, soar,
    libero_{10,object,goal,spatial}, rt_1, taco_play, jaco_play, berkeley_cable_routing, roboturk,
    nyu_door_opening_surprising_effectiveness, viola, berkeley_autolab_ur5, toto; `bridge`, the copy
    in the Open X-Embodiment bucket, is an OLDER data set (387 GB, 480x640). Own data:
    --source FOLDER with an .npz an episode (frames ([V,] T,H,W,3) uint8, actions (T,7-10), optional
    language, success, fps), or a folder an episode (images in the order of their numbers, or a
    folder of them a camera; actions.npy; optional metadata.json), below train/ and test/ or split
    by hash.
    """

    dataset_name: str = "bridge_v2"  # public data set, or the name of your own
    output_dir: str = "./data"  # episodes go to <output_dir>/<dataset_name>/{train,test}
    source: str = ""  # folder or URL to read instead of the public location
    splits: str = ""  # splits to convert, comma-separated (default: all)
    max_shards: int = 0  # convert only the first shards of each split (0: all)
    image_size: int = 256  # frames of another size are resized
    action_mapping: str = ""  # default: the data set's; own data: raw
    fps: float = 0.0  # frames a second (default: the set's; own data: its first episode's, or 5)
    num_workers: int = 4  # shards in flight at once
    check_crc: bool = True  # verify the checksum of every record
    on_error: Literal["stop", "skip"] = "stop"  # at a bad episode: stop, or leave it out, listed
    inspect: str = ""  # folder of a converted data set to look at instead

    def __post_init__(self):
        if min(self.image_size, self.num_workers) < 1 or self.max_shards < 0:
            raise InputError("need image_size, num_workers >= 1 and max_shards >= 0")
        if not 0 <= self.fps < math.inf:
            raise InputError(f"fps is {self.fps}; give frames a second")


class Shard(NamedTuple):
    """One unit of conversion; the index records it when all its episodes are written."""

    name: str  # its file, below the source
    target: str  # train, test, or "": each episode by a hash
    first: int  # number of its first episode
    count: int  # episodes that it should hold
    size: int = 0  # bytes, as far as known before it is read


def download(
    url: str,
    path: Path,
    progress: Callable[[int], Any],
    timeout: float = 30.0,
    tries: int = 8,
    pause: float = 1.0,
) -> None:
    """Download to `path`: resume, retry with growing pauses, check the length.

    Raises InputError when the server refuses, or when `tries` attempts in a row got no further.
    """
    part, furthest, failures = path.with_name(path.name + ".part"), 0, 0
    url = re.sub("^gs://", "https://storage.googleapis.com/", url)
    part.touch()
    while True:
        have = part.stat().st_size
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply, open(part, "ab") as out:
                if not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    out.truncate(have := 0)  # the server starts from the beginning
                while chunk := reply.read1(1 << 18):  # not read(): a stall would lose what came
                    out.write(chunk)
                    progress(len(chunk))
            size, length = part.stat().st_size, reply.headers.get("Content-Length", "")
            if length and size != have + int(length):
                raise ConnectionError(f"{size} of {have + int(length)} bytes came")
            os.replace(part, path)
            return
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)
            if getattr(error, "errno", 0) in DISK_FULL:
                raise
            if code == 416:  # more is here than the server has: begin again
                os.truncate(part, 0)
            arrived = part.stat().st_size
            failures, furthest = 0 if arrived > furthest else failures + 1, max(furthest, arrived)
            if failures >= tries or (code < 500 and code not in (408, 416, 429)):
                remedy = "check --source, or run the same command later"
                raise InputError(f"{url}: {error!r}; {remedy}") from error
            time.sleep(min(60.0, pause * 2**failures))


def list_shards(info: Any, base: Path, local: bool, args: Args) -> list[Shard]:
    """Name the RLDS shards to convert, as tfds' `info` lists them.

    On disk a file's prefix need not be the data set's name, and shards may be missing.
    """
    files = [path.name for path in base.iterdir() if path.is_file()] if local else []
    ending = functools.partial(re.sub, r".+(-[\w.]+-\d{5}-of-\d{5})", r"\1")
    found = {ending(file): file for file in files}
    wanted = {split.strip() for split in args.splits.split(",")} - {""}
    if unknown := wanted - {*info.splits} - {*map(TARGETS.get, info.splits)}:
        raise InputError(f"splits {unknown}: {base} has {', '.join(info.splits)}; choose of them")
    hashed, shards, first = "test" not in map(TARGETS.get, info.splits), [], 0
    for name, split in info.splits.items():
        target, here = TARGETS.get(name, ""), []
        counts = zip(split.filenames, split.shard_lengths, strict=True)
        for i, (file, count) in enumerate(counts):
            if not re.fullmatch(r"[\w.-]+", file):
                raise InputError(f"{base}: {file!r} is no name of a shard; fetch the list again")
            if local:
                file = found.get(ending(file))
            if file:
                place, size = first + 10_000 * i, split.num_bytes // split.num_shards
                here.append(Shard(file, "" if hashed else target, place, count, size))
        first += 10_000 * split.num_shards  # room for a shard's episodes, a few hundred
        if not wanted or wanted & {name, target}:
            if missing := split.num_shards - len(here):
                print(f"{base}: {missing} of {split.num_shards} shards of {name} are not here")
            shards += here[: args.max_shards or None]
    return shards


def list_own(root: Path, records: list[dict]) -> list[Shard]:
    """List the episodes of a user's own folder; those not yet in the index get free numbers."""
    foreign = "a LeRobot" if (root / "meta/info.json").exists() else ""
    if foreign or next(root.rglob("*.[mM][pP]4"), None):
        raise InputError(
            f"{root}: {foreign or 'an MP4'} folder; write each episode as .npz with these two lines"
            " (of PyAV and NumPy) and give their folder as --source\n"
            '    frames = [f.to_ndarray(format="rgb24") for f in av.open(video).decode(video=0)]\n'
            "    np.savez(name, frames=np.stack(frames), actions=actions, language=text)"
        )
    found = [*root.rglob("*.npz"), *(path.parent for path in root.rglob("actions.npy"))]
    paths = sorted(path.relative_to(root) for path in found)
    names = [str(p) for p in paths if not re.search(r"(^|/)\..", str(p))]  # hidden: copies of tools
    if not names:
        raise InputError(f"{root}: holds no features.json (RLDS), .npz or actions.npy; see --help")
    numbers = {}
    for record in records:
        for entry in itertools.chain(*record["episodes"].values()):
            numbers[record["shard"]] = entry["number"]
    taken = {*numbers.values()}
    free = (number for number in itertools.count() if number not in taken)
    numbers |= {name: next(free) for name in names if name not in numbers}
    return [Shard(n, TARGETS.get(n.split("/")[0], ""), numbers[n], 1) for n in names]


def open_source(args: Args, folder: Path, records: list[dict]) -> tuple:
    """Find what to convert: (source, folder of the shards, URL or "", shards, reader)."""
    public, names = SOURCES.get(args.dataset_name), ", ".join(SOURCES)
    where = args.source or (public.url if public else "")
    url = where if re.match("(https?|gs)://", where) else ""
    if args.dataset_name in ("", ".", "..") or folder.name != args.dataset_name or not where:
        raise InputError(f"dataset_name: take one of {names}, or give your own data as --source")
    if url:
        print(f"{args.dataset_name}: {public and public.gigabytes or '?'} GB in all at {url}")
        base = folder / "download"
        base.mkdir(parents=True, exist_ok=True)
        for name in ("features.json", "dataset_info.json"):
            download(f"{url}/{name}", base / name, lambda count: None)
    else:
        if not Path(where).is_dir():
            raise MissingFileError(f"{where}: no such folder; check --source")
        found = [p for deep in ("", "*/", "*/*/") for p in Path(where).glob(f"{deep}features.json")]
        if len(found) > 1:
            raise InputError(f"{where}: {len(found)} data sets ({found[0]}, ...); name one of them")
        if not found:
            if args.splits or args.max_shards:
                raise InputError("splits and max_shards choose public shards; leave them out")
            shards, fps = list_own(Path(where), records), 5.0
            if not (args.fps or records):  # nobody has said it yet: the first episode may
                first = next(read_own(Path(where) / shards[0].name))
                fps = first[2].get("fps", fps) if isinstance(first, tuple) else fps
            return Source("", None, "", "raw", fps, ""), Path(where), "", shards, read_own
        base = found[0].parent
    if not public:
        fault = f"RLDS data, {args.dataset_name!r} is none of {names}"
        raise InputError(f"{where}: {fault}; say which with --dataset_name")
    rlds = load_rlds(base, public)
    read = functools.partial(read_shard, source=public, rlds=rlds, check=args.check_crc)
    with reading(base / "dataset_info.json", "fetch it again", Exception):  # of tfds
        return public, base, url, list_shards(rlds[0], base, not url, args), read


def convert_shard(
    episodes: Iterable[Any], shard: Shard, folder: Path, header: dict, skip: bool
) -> dict:
    """Write a shard's episodes; return its record for the index.

    Raises InputError at a bad episode, with nothing of the shard left, unless `skip` lists it.
    """
    record = {"shard": shard.name, "episodes": {}, "errors": []}
    wrong = InputError(f"there should be {shard.count} episodes; fetch the shard again")
    with contextlib.ExitStack() as undo:
        for i, (episode, _) in enumerate(itertools.zip_longest(episodes, range(shard.count))):
            try:
                if not isinstance(episode, tuple):
                    raise episode or wrong  # an error, or None in the place of one that lacks
                frames, raw, about = episode
                name = about.pop("file", "") or f"{shard.name}/{i}"
                hashed = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
                split = shard.target or ("test" if hashed else "train")
                path = folder / split / FILE.format(shard.first + i)
                undo.callback(path.unlink, missing_ok=True)
                about = {"fps": header["fps"], "source": f"{shard.name}/{i}", **about}
                actions = map_actions(raw, header["action_mapping"])
                entry = write_episode(path, frames, actions, about, header["image_size"])
                record["episodes"].setdefault(split, []).append(entry)
                if i == shard.count:  # one too many; all are kept
                    raise wrong
            except InputError as error:
                message = f"{shard.name}, episode {i}: {error}"
                if not skip:
                    raise InputError(f"{message} (to leave it out: --on_error skip)") from error
                record["errors"].append(message)
        undo.pop_all()
    return record


def size_and_sha256(path: Path) -> dict:
    """Return the bytes and the SHA-256 of a shard; of a folder of images, those of its actions."""
    content = path if path.is_file() else path / "actions.npy"
    size = content.stat().st_size
    mapped = np.memmap(content, np.uint8, "r") if size else b""
    return {"bytes": size, "sha256": hashlib.sha256(mapped).hexdigest()}


def convert(args: Args) -> None:
    """Fetch, write and commit the shards that the index lacks; a killed run goes on from there."""
    folder, stop = Path(args.output_dir) / args.dataset_name, threading.Event()
    before, records, index_lock = {}, [], threading.Lock()
    with contextlib.suppress(MissingFileError):
        before, records, _ = read_index(folder)
    source, base, url, shards, read = open_source(args, folder, records)
    header = {"dataset": args.dataset_name, "image_size": args.image_size}
    header["fps"] = args.fps or (before["fps"] if records else source.fps)
    header["action_mapping"] = args.action_mapping or source.mapping
    map_actions(np.zeros(7), header["action_mapping"])  # an unknown name ends here
    if records and before != header:
        raise InputError(f"{folder} was written with {before}, not {header}; take another one")
    if not (records or shards):
        raise InputError(f"{folder}: nothing to convert; check --source and --splits")
    if before != header:
        (folder / "index.jsonl").unlink(missing_ok=True)  # of a run that finished no shard
        append_index(folder, header)
    for path in folder.glob("*/.*.tmp"):  # of a run that was killed
        path.unlink()
    start, done, finished = time.time(), 0, {record["shard"] for record in records}
    todo = [shard for shard in shards if shard.name not in finished]
    total = sum(shard.size for shard in todo) or None
    bar = tqdm(desc=folder.name, total=total, unit="B", unit_scale=True, disable=None)

    def progress(count: int) -> None:
        if stop.is_set():
            raise CancelledError
        bar.update(count)

    def job(shard: Shard) -> dict:
        path = base / shard.name
        if url and not path.exists():
            download(f"{url}/{shard.name}", path, progress)
        try:
            record = convert_shard(read(path), shard, folder, header, args.on_error == "skip")
        except InputError:
            if url:
                path.unlink()  # it may have been damaged on its way: the next run fetches it again
            raise
        record |= size_and_sha256(path)
        with index_lock:  # not later: another shard may end the run
            append_index(folder, record)
        path.unlink() if url else progress(record["bytes"])
        return record

    with ThreadPoolExecutor(args.num_workers) as pool, bar:
        try:
            for ready in as_completed([pool.submit(job, shard) for shard in todo]):
                done += ready.result()["bytes"] / 1e6
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    rate, (_, records, splits) = done / (time.time() - start), read_index(folder)
    errors = [f"left out: {error}" for record in records for error in record["errors"]]
    counts = ", ".join(f"{len(entries)} {split}" for split, entries in sorted(splits.items()))
    said = f"{folder}: {counts} episodes, {len(errors)} left out ({done:.1f} MB, {rate:.0f} MB/s)"
    print(said, *errors, sep="\n")


# --- Clips: which frames of which episode, in which order.

SAMPLINGS = ("stride", "uniform", "fps_1", "bookend", "final_heavy")


@dataclasses.dataclass
class DataConfig:
    """Choose data sets and say how clips are cut from their episodes."""

    dataset_dir: str = "./data"  # folder that holds one folder per data set
    subset_names: str = "bridge_v2"  # data sets, comma-separated
    subset_weights: str = ""  # their shares of an epoch, e.g. "3,1" (default: by size)
    image_size: int = 256  # side of the served frames
    num_frames: int = 10  # T
    num_history: int = 2  # how many of them are history
    stride: int = 2  # raw frames from one frame of a clip to the next
    variable_history: bool = False  # train split only: draw strides as the paper's code does
    action_merge: str = "drop"  # actions between kept frames: drop or sum
    views: int | tuple[int, ...] = 1  # number of cameras, or their numbers
    sampling: str = "stride"  # or how a probe sees an episode: uniform fps_1 bookend final_heavy
    seed: int = 0

    def __post_init__(self):
        self.views = tuple(range(self.views) if isinstance(self.views, int) else self.views)
        if not self.views or len({*self.views}) < len(self.views) or min(self.views) < 0:
            raise InputError(f"views is {self.views}; give a number >= 1 or distinct cameras")
        if self.action_merge not in ("drop", "sum") or self.sampling not in SAMPLINGS:
            raise InputError(f"action_merge must be drop or sum, sampling one of {SAMPLINGS}")
        if not 0 <= self.num_history < self.num_frames or min(self.stride, self.image_size) < 1:
            raise InputError("need 0 <= num_history < num_frames, stride >= 1, image_size >= 1")
        try:
            self.weights = [float(w) for w in self.subset_weights.split(",") if w.strip()]
        except ValueError:
            self.weights = [0.0]
        if self.weights and len(self.weights) != len(self.subset_names.split(",")):
            raise InputError("subset_weights: give one number per data set")
        if self.seed < 0 or not all(0 < weight < math.inf for weight in self.weights):
            raise InputError("seed must be >= 0, subset_weights positive numbers, comma-separated")


def probe_times(length: int, num_frames: int, sampling: str, fps: float) -> np.ndarray:
    """Choose frames that show how an episode ends; the last frame is always among them.

    length 40, 8 frames, 5 fps:
    uniform      0  6 11 17 22 28 33 39   evenly over all
    fps_1        4  9 14 19 24 29 34 39   one a second up to the end (closer if it is too short)
    bookend      0  1  2  3 36 37 38 39   half of them at each end
    final_heavy  0 10 20 24 28 31 35 39   a quarter of them for the first half, the rest after it
    """
    n, last = num_frames, length - 1
    step = min(max(1, round(fps)), last // max(1, n - 1))
    early, rest = np.arange(n // 4) * length / 2 / max(1, n // 4), n - n // 4
    times = {
        "uniform": np.linspace(0, last, n),
        "fps_1": last - step * np.arange(n)[::-1],
        "bookend": np.r_[: n // 2, length - n + n // 2 : length],
        "final_heavy": np.r_[early, np.linspace(length / 2 if n > 3 else 0, last, rest)],
    }
    order = np.arange(n)  # where they crowd, earlier ones make room: no frame comes twice
    late = (np.rint(times[sampling]).astype(np.int64) - order)[::-1]
    return np.minimum.accumulate(late)[::-1] + order


def draw_times(length: int, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw a clip of variable history; a clip that does not fit is not drawn, nothing is clamped.

    The future lies s apart, s in {stride, 2 stride}, from the current frame on; the history
    reaches back from it in steps of 4 s. In 15 % of the clips, and where no s fits, it repeats the
    current frame. [arXiv 2605.06388, released code, without its clamping]

    length 38, T 10, H 2, stride 2: s = 4 needs (4*2 + 7) * 4 + 1 = 61 frames, so s = 2 with 31;
    the current frame is one of 16..23, and 16 gives  0 8 | 16 18 20 22 24 26 28 30.
    """
    H, future, back = config.num_history, config.num_frames - config.num_history - 1, 4
    if rng.random() < 0.15 or (back * H + future) * config.stride >= length:
        back = 0
    strides = (config.stride, 2 * config.stride)
    s = int(rng.choice([s for s in strides if (back * H + future) * s < length]))
    current = int(rng.integers(back * s * H, length - future * s))
    return np.r_[current - back * s * np.arange(H, 0, -1), current + s * np.arange(future + 1)]


def merge_actions(actions: np.ndarray, times: np.ndarray, merge: str) -> np.ndarray:
    """Give each kept frame its own action ("drop") or the sum up to the next kept one ("sum").

    A sum takes the last gripper command; the last frame's spans as many steps as the one before,
    as far as the episode goes. A repeated frame has not moved: zeros and its gripper.
    """
    merged = actions[times]
    if merge == "sum":
        ends = [*times[1:], 2 * times[-1] - times[-2]] if len(times) > 1 else times + 1
        for row, start, end in zip(merged, times, ends, strict=True):
            row[:] = actions[start:end].sum(axis=0)
            row[6] = actions[max(start, min(end, len(actions)) - 1), 6]
    return merged


# --- Clips, served: frames, or what a frozen encoder made of them, cached in bfloat16.


class Clip(NamedTuple):
    """One item of an EpisodeDataset; `frames` are latents (T, h, w, C) where it serves a cache."""

    frames: torch.Tensor  # (T, H, W, 3), or (V, T, H, W, 3) for several views, in [0, 1] or uint8
    actions: torch.Tensor  # (T, A)


class EpisodeDataset(torch.utils.data.Dataset):
    """Serve clips of one split of the config's data sets; a clip is a pure function of its key.

    dataset[i]        clip of the i-th kept episode, starting where (seed, 0, i) says
    dataset[draw, i]  the same episode at another start; ClipSampler counts `draw` up every epoch
    fingerprint       of the latent cache to serve instead of frames
    as_stored         serve uint8 frames or bfloat16 latents: less to move, and in range for sure

    Opening reads the index only; an item opens its own file and reads its own frames' bytes.
    Raises InputError where a data set, a usable episode or a complete cache is missing.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        fingerprint: str | None = None,
        as_stored: bool = False,
    ):
        self.config, self.split, self.fingerprint = config, split, fingerprint
        self.convert = torch.as_tensor if as_stored else to_floats
        span = (config.num_frames - 1) * (config.stride if config.sampling == "stride" else 1)
        self.dropped, self.sizes = {"missing view": 0, "too short": 0}, []
        self.entries, headers = [], []
        for name in map(str.strip, config.subset_names.split(",")):
            folder = Path(config.dataset_dir) / name
            if name in ("", ".", "..") or folder.name != name:
                raise InputError(f"subset_names: {name!r} is not the name of a data set")
            header, _, splits = read_index(folder)
            if header.get("toy", {}).get("version", TOY_VERSION) != TOY_VERSION:
                raise InputError(f"{folder}: toy episodes of another version; remove them")
            seen = [e for e in splits.get(split, []) if {*config.views} <= {*e["views"]}]
            kept = [(folder / split, entry) for entry in seen if entry["length"] > span]
            self.dropped["missing view"] += len(splits.get(split, [])) - len(seen)
            self.dropped["too short"] += len(seen) - len(kept)
            if not kept:
                raise InputError(
                    f"{folder}: no usable episode in split {split!r} (dropped: {self.dropped}); "
                    "convert more, shorten the clips or take other views"
                )
            if fingerprint is not None:
                target = self.latent_folder(folder / split)
                cached = {*os.listdir(target)} if target.is_dir() else set()
                if lost := sum(FILE.format(e["number"]) not in cached for _, e in kept):
                    raise InputError(
                        f"{target}: no complete latent cache, {lost} of {len(kept)} episodes lack; "
                        "write it with --cache_latents True"
                    )
            headers.append(header)
            self.entries += kept
            self.sizes.append(len(kept))
        self.fps = min(header["fps"] for header in headers)
        self.action_mapping = "+".join(sorted({header["action_mapping"] for header in headers}))

    def __len__(self) -> int:
        return len(self.entries)

    def info(self, key: int | tuple[int, int]) -> dict:
        """Describe a clip without opening its file: path, times (T,), success, language, length."""
        draw, i = key if isinstance(key, tuple) else (0, key)
        if not 0 <= i < len(self):
            raise IndexError(i)
        config, (folder, entry) = self.config, self.entries[i]
        length, rng = entry["length"], np.random.default_rng((config.seed, draw, i))
        if config.sampling != "stride":
            times = probe_times(length, config.num_frames, config.sampling, self.fps)
        elif config.variable_history and self.split == "train":
            times = draw_times(length, config, rng)
        else:
            times = config.stride * np.arange(config.num_frames)
            times += rng.integers(length - times[-1])
        return {**entry, "path": folder / FILE.format(entry["number"]), "times": times}

    def __getitem__(self, key: int | tuple[int, int]) -> Clip:
        config, info = self.config, self.info(key)
        episode, times = Episode(info["path"]), info["times"]
        if len(episode) != info["length"]:
            raise InputError(f"{episode.path}: {len(episode)} frames, not as indexed; {REMEDY}")
        if self.fingerprint is None:
            frames = self.convert(episode.frames(times, config.views, config.image_size))
        else:
            frames = self.read_latents(episode, times)
        actions = torch.from_numpy(merge_actions(episode.actions, times, config.action_merge))
        return Clip(frames[0] if len(frames) == 1 else frames, actions)

    def latent_folder(self, folder: Path) -> Path:
        """Name the cache of a split's folder for this fingerprint, frame size and these cameras."""
        key = json.dumps([self.fingerprint, self.config.image_size, self.config.views])
        return folder / f"latents_{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def read_latents(self, episode: Episode, times: np.ndarray) -> torch.Tensor:
        """Read the latents of a clip's frames, and no other bytes: (V, T, h, w, C)."""
        path, shape = episode.path, [len(self.config.views), len(episode)]
        cached = self.latent_folder(path.parent) / path.name
        remedy = "remove it, then --cache_latents true writes it again"
        with open_tensors(cached, remedy=remedy) as (file, metadata):
            rows = file.get_slice("z")
            found = rows.get_dtype(), len(rows.get_shape()), rows.get_shape()[:2], metadata
            made_of = {"fingerprint": self.fingerprint, "jpeg_bytes": int(episode.offsets[-1])}
            if found != ("BF16", 5, shape, made_of):
                raise ValueError(f"stale latents, {found}, not {made_of}")
            return self.convert(torch.cat([rows[:, t : t + 1] for t in times.tolist()], dim=1))


def write_latent_cache(
    config: DataConfig,
    split: str,
    fingerprint: str,
    encode: Callable,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Encode every frame of the config's data sets once; a killed run continues where it was.

    fingerprint  of everything that shapes a latent: encoder, its weights, adapter
    encode       (1, T, H, W, 3) in [0, 1] -> (1, T, h, w, C), called with at most 32 frames
    shard        (rank, world): this process encodes its part of the episodes
    """
    every = EpisodeDataset(dataclasses.replace(config, num_frames=1, num_history=0), split)
    every.fingerprint, quiet = fingerprint, shard[0] > 0 or None
    for i in tqdm(range(shard[0], len(every), shard[1]), f"cache {split}", disable=quiet):
        source = every.info(i)["path"]
        path = every.latent_folder(source.parent) / source.name
        if not path.exists():
            episode, z = Episode(source), []
            for view, t in itertools.product(config.views, range(0, len(episode), 32)):
                times = range(t, min(t + 32, len(episode)))
                frames = to_floats(episode.frames(times, [view], config.image_size))
                z.append(encode(frames)[0].bfloat16().cpu())
            z = torch.cat(z).unflatten(0, (len(config.views), len(episode)))
            made_of = {"fingerprint": fingerprint, "jpeg_bytes": int(episode.offsets[-1])}
            save_tensors(path, {"z": z}, made_of)


class ClipSampler(torch.utils.data.Sampler):
    """Yield batches of keys for ever: a DataLoader's `sampler` of whole batches, resumable.

    The keys form one endless sequence given by the config's seed: epoch after epoch, each freshly
    shuffled and as long as the data sets together; `subset_weights` set each one's share. Global
    batch n is the slice n G ... (n + 1) G with G = world_size * batch_size; rank r takes its r-th
    part: N processes with batch b see what one with batch N b sees, and no batch is uneven.

    start  number of batches taken before: resumes in the middle of an epoch
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ):
        self.sizes, self.seed, self.start = dataset.sizes, dataset.config.seed, start
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        weights = dataset.config.weights or self.sizes
        share = np.array(weights) / sum(weights)
        self.counts = np.maximum(1, np.rint(share * sum(self.sizes))).astype(np.int64).tolist()
        self.epoch_length = sum(self.counts)  # clips, over all processes
        self.order = functools.lru_cache(2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        """Return an epoch's keys (draw, clip): every data set is walked through in passes, each
        clip once a pass, and `draw` is the pass: no clip comes again with the same start."""
        keys, first = [], 0
        for subset, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            position = np.arange(epoch * count, (epoch + 1) * count)
            for draw in range(position[0] // size, position[-1] // size + 1):
                shuffled = np.random.default_rng((self.seed, subset, draw, 1)).permutation(size)
                clips = first + shuffled[position[position // size == draw] % size]
                keys.append(np.stack([np.full_like(clips, draw), clips], axis=1))
            first += size
        return np.random.default_rng((self.seed, epoch, 2)).permutation(np.concatenate(keys))

    def batch(self, number: int) -> list[tuple[int, int]]:
        """Return this rank's keys of global batch `number`."""
        first = (number * self.world_size + self.rank) * self.batch_size
        places = (divmod(p, self.epoch_length) for p in range(first, first + self.batch_size))
        return [tuple(self.order(epoch)[i].tolist()) for epoch, i in places]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, itertools.count(self.start))


def even_indices(size: int, count: int) -> list[int]:
    """Pick at most `count` of `size` places, evenly."""
    return np.linspace(0, size - 1, min(count, size)).round().astype(int).tolist()


# --- Runs: how training begins, goes on after a kill, and ends.

# By the name of the device, dense bfloat16 TFLOP/s and TB/s of its memory; elsewhere model FLOPs
# utilisation stays blank.
GPUS = {"B200": (2250, 8), "H200": (989, 4.8), "H100": (989, 3.35), "A100": (312, 2.04)}
GPUS |= {"L40S": (362, 0.86), "RTX 4090": (165, 1.01)}


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the peak signal-to-noise ratio in dB; (..., H, W, 3) in [0, 1] -> (...)."""
    return -10 * (a - b).square().mean((-3, -2, -1)).clamp_min(1e-10).log10()


def read_args(cls: type, toy: Any, fixed: Sequence[str]) -> tuple[Any, list[str]]:
    """Parse the command line over the config of the run to --resume: (args, what differs).

    Raises InputError where a flag named in `fixed` differs from the run's.
    """
    if not (found := re.search("\0--resume[=\0]([^\0]+)", "\0".join(sys.argv))):
        return parse_args(cls, toy), []
    path = Path(found[1]) / "config.json"
    with reading(path, "--resume takes the folder of a run", ValueError):
        old = config_from(cls, json.loads(path.read_text()), str(path))
    new, changes = parse_args(cls, toy, default=old), []
    for name, before in vars(old).items():
        now = getattr(new, name)
        if now != before and name not in ("resume", "output_dir"):
            changes.append(f"changed since the run was started: {name} {before} -> {now}")
            if name in fixed:
                fault = f"the run was started with {before}, which resuming cannot change"
                raise InputError(f"--{name} {now}: {fault}; leave the flag out or start a new run")
    return new, changes


def check_flags(args: Any, counts: str) -> None:
    """Refuse counts (names in one text) below 1, other numbers that are negative or not finite."""
    for name, value in vars(args).items():
        if name in counts.split() and value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise InputError(f"{name} is {value}; give a number that is at least 0")
    check_seed(args.seed)


def check_seed(seed: int) -> None:
    """Refuse a seed that NumPy's generators cannot take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; give a number from 0 to 2^32 - 1")


def setup(cls: type, toy: Any, fixed: Sequence[str]) -> tuple[Any, Processes]:
    """Read the flags, join the other processes, seed every random generator."""
    args, changes = read_args(cls, toy, fixed)
    proc = init_processes(args.device)
    if changes and proc.rank == 0:
        print(*changes, sep="\n")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    return args, proc


def prepare_data(args: Any, proc: Processes, **others: Any) -> DataConfig:
    """Say how clips are cut, as the flags do; write the toy world when it is first used."""
    toy = "toy" in args.subset_names.split(",") and not Path(args.dataset_dir, "toy").exists()
    if toy and proc.rank == 0:
        generate_toy(args.dataset_dir)
    proc.barrier()
    names = vars(args).keys() & {field.name for field in dataclasses.fields(DataConfig)}
    return DataConfig(**{n: getattr(args, n) for n in names}, views=args.num_views, **others)


def fill_cache(
    config: DataConfig, proc: Processes, fingerprint: str, encode: Callable, stride: int
) -> None:
    """Have all processes write the latent cache of the training clips; stride frames a latent."""
    if stride > 1:
        fault = "these features depend on the clip and cannot be cached"
        raise InputError(f"cache_latents: {fault}; give --cache_latents false")
    write_latent_cache(config, "train", fingerprint, encode, (proc.rank, proc.world_size))
    proc.barrier()


def wrap(module: torch.nn.Module, proc: Processes, compiled: bool = False) -> Callable:
    """Compile a module if wanted; average its gradients over all processes if there are several."""
    net = torch.compile(module) if compiled else module
    if proc.world_size > 1:
        mesh = torch.distributed.init_device_mesh(proc.device.type, (proc.world_size,))
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        net = torch.nn.parallel.DistributedDataParallel(net, device_mesh=mesh, **options)
    return net


def ignore_signals(_: int) -> None:
    """Leave signals, which reach loader processes too, to the training process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class BatchDataset(torch.utils.data.Dataset):
    """Read the clips of a list of keys as one batch; an error of ours is returned, as it is."""

    def __init__(self, clips: torch.utils.data.Dataset):
        self.clips = clips

    def __getitem__(self, keys: list) -> Any:
        try:
            return torch.utils.data.default_collate([self.clips[key] for key in keys])
        except InputError as error:  # a loader would wrap it in a traceback
            return error


class Run:
    """Keep a run's folder so that a killed run, resumed, is the same run; tell how it goes.

    folder   gets config.json, log.csv, loss.png, last.pt and, one save older, previous.pt
    parts    {name: module or optimiser} that a checkpoint holds
    dataset  whose clips are drawn
    source   fingerprint of what makes latents of frames
    columns  of log.csv
    forward  passes one clip through the model: its FLOPs are counted
    """

    def __init__(
        self,
        folder: Path,
        args: Any,
        proc: Processes,
        parts: dict[str, Any],
        dataset: EpisodeDataset,
        source: str,
        columns: Sequence[str],
        forward: Callable,
    ):
        self.folder, self.log, self.columns = folder, folder / "log.csv", columns
        self.args, self.proc, self.device = args, proc, proc.device
        self.parts, self.dataset = parts, dataset
        self.optimizers = [p for p in parts.values() if isinstance(p, torch.optim.Optimizer)]
        self.print0 = print if proc.rank == 0 else lambda *_: None
        self.global_batch = args.batch_size * args.grad_accum * proc.world_size
        self.epoch_steps = max(1, len(dataset) // self.global_batch)
        steps = args.num_epochs * self.epoch_steps
        self.last_step = steps if args.max_steps is None else args.max_steps
        self.fixed = {"encoder and adapter": source}  # besides the flags
        self.fixed["clips a step (batch_size x grad_accum x processes)"] = self.global_batch
        self.config = dataclasses.asdict(dataclasses.replace(args, resume=None))
        self.step, self.state, self.sums = 0, None, {}
        self.rotate = True  # whether last.pt deserves to become previous.pt
        self.skipped, self.in_a_row = torch.zeros(2, device=proc.device)
        self.generator = torch.Generator(proc.device)  # of what is drawn in a step
        if args.resume:
            self.load()
        elif any((folder / name).exists() for name in ("last.pt", "previous.pt")):
            raise InputError(f"{folder}: holds a run; --resume {folder} or take another folder")
        if proc.rank == 0:
            self.prepare()
        self.signals: list[int] = []
        self.unsaved: dict[str, str] = {}  # files that could not be written, and why
        self.handlers = {
            number: signal.signal(number, lambda number, _: self.signals.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peaks = [1e12 * peak for kind, (peak, _) in GPUS.items() if kind in name]
        self.peak_flops = peaks[0] if peaks else None
        if self.peak_flops:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                forward()
            clip = 3 * counter.get_total_flops()  # the backward pass takes twice the forward's
            self.step_flops = clip * args.batch_size * args.grad_accum
        self.print0(f"{len(dataset)} episodes, {self.epoch_steps} steps an epoch, {folder}")
        hidden = proc.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=self.last_step, initial=self.step, disable=hidden)
        self.log_step, self.log_time = self.step, time.perf_counter()

    def prepare(self) -> None:
        """Write config.json and the log up to this step; remove what a killed run left behind."""
        write_atomic(self.folder / "config.json", json.dumps(self.config, indent=1).encode())
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        old = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = [",".join(self.columns) + "\n"]
        for line in re.findall(r"^\d+,.*,.*\n", old, re.MULTILINE):  # whole ones
            step, loss = line.split(",", 2)[:2]
            again = not loss and int(step) == self.step and self.due(self.args.val_every)
            if int(step) <= self.step and not again:  # that validation is done once more
                lines.append(line)
        write_atomic(self.log, "".join(lines).encode())

    def load(self) -> None:
        """Go on from the newest checkpoint that is whole."""
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            try:
                self.state = load_torch(path)
                needed = {"episodes", "random", "fixed", "step", "skipped", "in_a_row", *self.parts}
                if lacking := needed.difference(self.state):
                    raise InputError(f"{path}: is of another script or version, without {lacking}")
                self.rotate = path.name == "last.pt"
                break
            except InputError as error:
                self.print0(f"warning: {error}")
        else:
            raise MissingFileError(f"{self.folder}: no whole last.pt or previous.pt to resume")
        for name, now in self.fixed.items():
            before = self.state["fixed"].get(name)
            if before != now:
                fault = f"was trained with {before} {name}, now {now}"
                raise InputError(f"{self.folder}: {fault}; go on as it began")
        for name, part in self.parts.items():
            try:
                part.load_state_dict(self.state.pop(name))
            except (LookupError, RuntimeError, ValueError) as error:
                raise InputError(f"{path}: {name} is of another model; {error}") from error
        before, now = self.state["episodes"], len(self.dataset)
        if before != now:
            change = f"episodes {before} -> {now}, a new order"
            self.print0(f"changed since the run was started: {change}")
        self.step = self.state["step"]
        self.skipped[...], self.in_a_row[...] = self.state["skipped"], self.state["in_a_row"]
        steps = self.proc.all_gather(self.step)
        if len({*steps}) > 1:
            raise InputError(f"{self.folder}: processes read steps {steps}; make it whole for all")
        self.print0(f"resumed {self.folder} at step {self.step}")

    def start_loader(self, clips: torch.utils.data.Dataset) -> Iterator:
        """Serve this process's batches from here on, every random generator as it was here."""
        args, proc, start = self.args, self.proc, self.step * self.args.grad_accum
        sampler = ClipSampler(self.dataset, args.batch_size, proc.rank, proc.world_size, start)
        options = {"pin_memory": self.device.type == "cuda", "worker_init_fn": ignore_signals}
        options |= {"sampler": sampler, "batch_size": None, "num_workers": args.num_workers}
        batches = self.serve(iter(torch.utils.data.DataLoader(BatchDataset(clips), **options)))
        self.close_loader = weakref.finalize(self, batches.close)  # at the latest
        atexit.register(self.close_loader)  # before Python waits for its children
        if self.state:
            python, numpy, cpu, cuda = self.state["random"][proc.rank % len(self.state["random"])]
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if cuda is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(cuda, self.device)
        return batches

    @staticmethod
    def serve(batches: Iterator) -> Iterator:
        """Hand batches on; loader processes end with it, as SIGTERM does not end them."""
        try:
            for batch in batches:
                if isinstance(batch, InputError):
                    raise batch
                yield batch
        finally:
            del batches

    def micro_steps(self, net: Callable, batches: Iterator) -> Iterator[tuple]:
        """Serve a step's batches, each with {generator, shard} for `diffusion.draw`.

        Only the backward pass of the last one averages gradients over the processes.
        """
        accum, world = self.args.grad_accum, self.proc.world_size
        for micro in range(accum):
            self.generator.manual_seed(self.args.seed + 1_000_003 * self.step)
            shard = micro * world + self.proc.rank, accum * world
            draws = {"generator": self.generator, "shard": shard}
            wait = world > 1 and micro + 1 < accum
            with net.no_sync() if wait else contextlib.nullcontext():
                yield next(batches), draws

    def on_rank0(self, write: Callable, *args: Any) -> None:
        """Have rank 0 write while all wait; a run that cannot write goes on, the old files stay."""
        if self.proc.rank == 0:
            what = str(args[0]) if args else "the log"
            self.unsaved.pop(what, None)
            try:
                write(*args)
            except OSError as error:
                self.unsaved[what] = str(error)  # itself would keep what was to be written
                self.print0(f"warning: {what} could not be saved ({error}); the run goes on")
        self.proc.barrier()

    def save(self) -> None:
        """Write last.pt, keep the one before as previous.pt; a kill leaves at least one of them."""
        kind, keys, *others = np.random.get_state()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        numpy = (kind, keys.tolist(), *others)
        states = self.proc.all_gather((random.getstate(), numpy, torch.get_rng_state(), cuda))
        epoch, position = divmod(self.step * self.global_batch, len(self.dataset))
        state = {"step": self.step, "epoch": epoch, "position": position, "config": self.config}
        state |= {"skipped": self.skipped.item(), "in_a_row": self.in_a_row.item()}
        state |= {"fixed": self.fixed, "episodes": len(self.dataset), "random": states}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        last = self.folder / "last.pt"

        def write(path: Path) -> None:
            try:
                torch.save(state, path)
            except RuntimeError as error:  # what torch makes of it
                raise OSError(f"is the disk full? {error}") from error
            if self.rotate and last.exists():
                os.replace(last, last.with_name("previous.pt"))
            self.rotate = True

        self.on_rank0(write_atomic, last, write)
        self.on_rank0(self.plot_loss)

    def due(self, every: int) -> bool:
        """Tell whether it is time for what happens every so many steps, and at the end."""
        return self.step >= self.last_step or (self.step > 0 and self.step % every == 0)

    def update(self, *norms: torch.Tensor) -> None:
        """Step the optimisers, unless a norm is not finite; fused AdamW needs no host sync for it.

        After ten such steps in a row all are skipped, until `log_losses` looks.
        """
        bad = (~torch.stack(norms).isfinite().all() | (self.in_a_row >= 10)).float()
        for optimizer in self.optimizers:
            optimizer.found_inf = bad
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad
        self.step += 1
        self.bar.update()

    def log_row(self, row: dict[str, float], show: bool = True) -> None:
        """Append a row to log.csv and show it."""
        values = [row.get(name, "") for name in self.columns]
        line = ",".join(f"{v:.8g}" if isinstance(v, float) else str(v) for v in values)

        def append() -> None:
            with self.log.open("a") as file:
                file.write(line + "\n")

        self.on_rank0(append)
        if show:
            texts = [f"{name} {value:.4g}" for name, value in row.items() if name != "step"]
            self.print0(f"step {self.step}: {', '.join(texts)}")

    def accumulate(self, **values: torch.Tensor) -> None:
        """Collect losses of a micro step; `log_losses` gives their means from when they began."""
        for name, value in values.items():
            total, first = self.sums.get(name, (0.0, self.step))
            self.sums[name] = total + value.detach() / self.args.grad_accum, first

    def log_losses(self, lr: float, **norms: torch.Tensor) -> None:
        """Log the mean losses since the last report; stop after ten steps that were not finite."""
        if self.step % self.args.log_every and self.step < self.last_step:
            return
        steps = self.step - self.log_step
        means = [total / (self.step - first) for total, first in self.sums.values()]
        means = torch.stack([*means, *norms.values()])
        means = self.proc.all_reduce(torch.cat((means, self.in_a_row[None])))
        *means, bad = (means / self.proc.world_size).tolist()  # the only host sync
        row = {"step": self.step, **dict(zip((*self.sums, *norms), means, strict=True)), "lr": lr}
        pace = (time.perf_counter() - self.log_time) / steps
        row |= {"clips_per_s": self.global_batch / pace, "ms_per_step": 1000 * pace}
        row |= {"mfu": self.step_flops / pace / self.peak_flops} if self.peak_flops else {}
        row |= {"minutes_left": pace * (self.last_step - self.step) / 60}
        if self.device.type == "cuda":  # the most so far
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:  # bytes on macOS, KiB elsewhere
            unit = 1e9 if sys.platform == "darwin" else 1e6
            row["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self.log_row(row | {"skipped": self.skipped.item()}, show=self.bar.disable)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}")
        self.sums, self.log_step, self.log_time = {}, self.step, time.perf_counter()
        if bad >= 10:
            first = self.step - round(bad)
            self.in_a_row.zero_()
            self.save()
            batch = ClipSampler(self.dataset, self.global_batch).batch
            keys = (key for number in range(first, first + 10) for key in batch(number))
            names = sorted({str(self.dataset.info(key)["path"]) for key in keys})
            raise InputError(
                f"step {self.step}: ten losses in a row were not finite, of steps {first + 1} to "
                f"{first + 10}, whose clips were of {', '.join(names)}; look at them, or "
                f"lower --lr and --resume {self.folder}"
            )

    def plot_loss(self) -> None:
        """Draw the loss over the steps, on a logarithmic axis, as loss.png."""
        rows = [line.split(",")[:2] for line in self.log.read_text().splitlines()[1:]]
        points = [(int(s), math.log10(float(v))) for s, v in rows if v and 0 < float(v) < math.inf]
        if len(points) < 2:
            return
        (end, last), logs = points[-1], [log for _, log in points]
        low, span = min(logs), max(max(logs) - min(logs), 0.01)
        image = Image.new("RGB", (800, 480), "white")
        pen = ImageDraw.Draw(image)
        for share in (0, 0.25, 0.5, 0.75, 1):
            x, y = 70 + 700 * share, 440 - 400 * share
            pen.line((70, y, 770, y), fill="#dddddd")
            pen.text((10, y - 6), f"{10 ** (low + span * share):.4g}", fill="black")
            pen.text((x - 12, 450), f"{end * share:.0f}", fill="black")
        curve = [(70 + 700 * step / end, 440 - 400 * (log - low) / span) for step, log in points]
        pen.line(curve, fill="#1f5fbf", width=2)
        pen.text((70, 12), f"loss, {10**last:.4g} at step {end}", fill="black")
        write_atomic(self.folder / "loss.png", lambda path: image.save(path, "PNG"))

    def end(self) -> None:
        """Say how to go on with a run that was stopped; leave loaders, signals and processes."""
        self.close_loader()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.step < self.last_step:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", self.proc.world_size))
            launch = f"torchrun --nproc_per_node={here}" if self.proc.world_size > 1 else "python"
            if (nodes := self.proc.world_size // here) > 1:
                launch += f" --nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT"
            command = f"{launch} {Path(sys.argv[0]).name} --resume {self.folder}"
            self.print0(f"stopped at step {self.step}; go on with: {command}")
        self.proc.cleanup()
        for what, error in self.unsaved.items():
            if what.endswith((".pt", ".safetensors")):
                saved = any((self.folder / f"{name}.pt").exists() for name in ("last", "previous"))
                again = f"--resume {self.folder}" if saved else "begin again"
                raise InputError(f"{what}: could not be saved ({error}); mend that and {again}")


# --- Looking at converted data, and the command line.


def inspect(folder: Path) -> None:
    """Print what a converted data set holds; write contact_sheet.png and episodes.gif into it."""
    header, records, splits = read_index(folder)
    sheet, movie = [], []
    if not splits:
        raise InputError(f"{folder}: holds no episode; run the conversion to its end")
    print(f"{folder}: {json.dumps(header)}")
    for split, entries in sorted(splits.items()):
        paths = [folder / split / FILE.format(entry["number"]) for entry in entries]
        actions = np.concatenate([Episode(p).actions for p in tqdm(paths, split, disable=None)])
        lengths = np.array([entry["length"] for entry in entries])
        labels = [entry["success"] for entry in entries if entry["success"] is not None]
        texts = Counter(entry["language"] for entry in entries)
        cameras = Counter(f"cameras {entry['views']}" for entry in entries)
        print(
            f"{split}: {len(entries)} episodes, {lengths.sum()} frames, {lengths.min()} to "
            f"{lengths.max()} long (mean {lengths.mean():.1f}); {dict(cameras)}",
            f"dropped by a loader of 10 frames at stride 2: {(lengths < 19).sum()} too short",
            f"success: {np.mean(labels or [0]):.1%} of {len(labels)} labelled episodes",
            f"{len(texts)} instructions: {'; '.join(repr(t) for t, _ in texts.most_common(5))}",
            f"actions from {' '.join(f'{x:.3f}' for x in actions.min(axis=0))}",
            f"          to {' '.join(f'{x:.3f}' for x in actions.max(axis=0))}",
            sep="\n  ",
        )
        for path, entry in list(zip(paths, entries, strict=True))[:: -(-len(paths) // 6)]:
            episode, last = Episode(path), entry["length"] - 1
            rows = episode.frames(np.linspace(0, last, 8).round(), episode.views, 128)
            for view, row in zip(episode.views, rows, strict=True):
                label = f"{split}/{path.stem} camera {view}: {entry['language']!r}"
                strip = np.pad(np.hstack(row), ((14, 0), (0, 0), (0, 0)), constant_values=255)
                sheet.append(Image.fromarray(strip))
                ImageDraw.Draw(sheet[-1]).text((2, 1), label, "black")
            movie.append(episode.frames(np.minimum(range(50), last), episode.views[:1], 128)[0])
    errors = [error for record in records for error in record.get("errors", ())]
    reasons = Counter()
    for error in errors:  # without the names of episode and file, without numbers
        reason = re.sub(r"^.*?, episode \d+: |\S*/\S*", "", error)
        reasons[re.sub(r"\d+", "N", reason).strip()] += 1
    print(f"left out by the conversion: {len(errors)}")
    print(*(f"  {count} x {reason}\n" for reason, count in reasons.most_common()), sep="", end="")
    image = Image.fromarray(np.concatenate([*map(np.asarray, sheet)]))
    write_atomic(folder / "contact_sheet.png", lambda path: image.save(path, "PNG"))
    write_gif(folder / "episodes.gif", np.concatenate(movie[:6], axis=2), header["fps"])
    print(f"written: {folder}/contact_sheet.png, {folder}/episodes.gif")


def main() -> None:
    """Convert or inspect, as the command line says."""
    args = parse_args(Args)
    inspect(Path(args.inspect)) if args.inspect else convert(args)


if __name__ == "__main__":
    run_cli(main)
