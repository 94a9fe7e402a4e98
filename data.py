"""Read, convert and serve robot episodes; own every file that the project writes.

Sources: Bridge V2 in RLDS layout (Walke et al. 2023, arXiv 2308.12952), our embedded toy world.

    shard.tfrecord --read--> episode --convert--> NNNNNNNNN.safetensors --EpisodeDataset--> clip

Shapes: B batch, V views, T frames, H W pixels, A action width.
    frames   (T, H, W, 3) or (V, T, H, W, 3)   float32 in [0, 1]
    actions  (T, A)                            action[t] drives frame t to frame t + 1
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.utils.data
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Errors and files. Everyone may import this section.


class InputError(ValueError):
    """Report a fault in what the user typed or in a file, in one sentence: what, where, remedy."""


class MissingFileError(InputError, FileNotFoundError):
    """Report a file or folder that is not there."""

    __str__ = ValueError.__str__  # OSError would print "[Errno ...]"


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's `main`; print our own errors without a traceback and exit with code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_args(cls: type, toy: Any = None) -> Any:
    """Parse the command line into a config dataclass with tyro: `--flag value` for every field.

    toy  the defaults when the first word is 'toy' (the embedded world); None: no such word
    """
    import tyro

    words = [{"true": "True", "false": "False"}.get(word, word) for word in sys.argv[1:]]
    embedded = toy is not None and words[:1] == ["toy"]
    return tyro.cli(
        cls,
        args=words[1:] if embedded else words,
        default=toy if embedded else None,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def write_atomic(path: str | Path, write: bytes | Callable[[Path], None]) -> None:
    """Write a file beside `path`, fsync it, rename it: a kill leaves the old file or the new one.

    write  bytes, or a function that writes the temporary path it is given
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if callable(write):
            write(temporary)
        else:
            temporary.write_bytes(write)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write a safetensors file atomically; `metadata` is any JSON value, read by `load_tensors`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, serialize_tensors(tensors, {"metadata": json.dumps(metadata)}))


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict, dict]:
    """Read a safetensors file: ({name: tensor}, our metadata or {}).

    Raises MissingFileError, or InputError when the file is truncated or of another format.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"{path}: no such file; check the path")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = json.loads((file.metadata() or {}).get("metadata", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({error}); it is truncated or of another "
            "format: copy or write it again"
        ) from error


def load_torch(path: str | Path) -> Any:
    """Read a `.pt` file on the CPU without ever running code in it (weights_only, memory-mapped).

    Raises MissingFileError, or InputError when it is truncated or holds more than plain data.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"{path}: no such file; check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen types for broken archives
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: cannot be read as plain tensors ({reason}); it is truncated, of another "
            "format, or needs code to run, which is refused: fetch or write it again"
        ) from error


def strip_prefixes(state: dict[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """Remove wrapper prefixes such as 'module.' and '_orig_mod.' from the front of every key."""
    out = {}
    for name, tensor in state.items():
        while prefix := next((p for p in prefixes if name.startswith(p)), None):
            name = name[len(prefix) :]
        out[name] = tensor
    return out


def load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Copy `state` into `module`; names and shapes must match exactly.

    Raises InputError naming missing and unexpected keys and the first shapes that differ.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [
        f"{len(names)} {what} (" + ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") + ")"
        for what, names in (("missing", missing), ("unexpected", extra), ("of other shape", shapes))
        if names
    ]
    if faults:
        raise InputError(
            f"{where}: tensors do not fit {type(module).__name__}: {'; '.join(faults)}; "
            "choose the file or the options that belong together"
        )
    module.load_state_dict(state)


def config_from(cls: type, values: dict, where: str) -> Any:
    """Build a config dataclass from stored values; unknown or ill-typed fields are refused."""
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise InputError(
            f"{where}: {cls.__name__} has no field {', '.join(unknown)}; the file was written by "
            "another version: use that version or write the file again"
        )
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {cls.__name__} cannot be built: {error}") from error


# ------------------------------------------------------------------------------------------------
# Processes and pictures. Everyone may import this section too.


class Processes(NamedTuple):
    """This process among all that torchrun started."""

    rank: int
    world: int
    local_rank: int
    device: torch.device


def init_processes(device: str | None = None, timeout_minutes: float = 60) -> Processes:
    """Join the process group when torchrun started us (NCCL on CUDA, gloo elsewhere)."""
    rank, world, local_rank = (
        int(os.environ.get(name, value))
        for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda":
        where = torch.device("cuda", local_rank if where.index is None else where.index)
        torch.cuda.set_device(where)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    return Processes(rank, world, local_rank, where)


def to_uint8(frames: torch.Tensor | np.ndarray) -> np.ndarray:
    """Turn frames in [0, 1] into bytes; uint8 passes through."""
    frames = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    if frames.dtype == np.uint8:
        return frames
    return (np.clip(frames.astype(np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)


def write_gif(path: str | Path, frames: torch.Tensor | np.ndarray, fps: float = 5) -> None:
    """Write an endless GIF of frames (T, H, W, 3) with one palette for all of them: no flicker."""
    frames = to_uint8(frames)
    assert frames.ndim == 4 and frames.shape[-1] == 3, frames.shape
    picked = frames[:: max(1, len(frames) // 16)]
    palette = Image.fromarray(np.concatenate(picked)).quantize(256, Image.Quantize.FASTOCTREE)
    images = [
        Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames
    ]
    options = {"save_all": True, "append_images": images[1:], "duration": 1000 / fps, "loop": 0}
    write_atomic(path, lambda temporary: images[0].save(temporary, "GIF", **options))


# ------------------------------------------------------------------------------------------------
# Episode files: JPEG bytes of every view and frame, actions, metadata; and their index.

ACTION_DIM = 10  # xyz (3), rotation (3), gripper (1: -1 open, +1 closed), base (3)
REMEDY = "convert the data set again"


def open_image(image: bytes, where: str) -> Image.Image:
    """Open a JPEG or PNG without decoding it; more than 4096 pixels a side are refused."""
    try:
        opened = Image.open(io.BytesIO(image), formats=("JPEG", "PNG"))
    except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: not a JPEG or PNG image; {REMEDY}") from error
    if max(opened.size) > 4096:
        raise InputError(f"{where}: an image of {opened.size} pixels is too large; {REMEDY}")
    return opened


def decode_frame(image: bytes | np.ndarray, size: int | None, where: str) -> np.ndarray:
    """Return an image file or array as uint8 (H, W, 3), resized to `size` squared unless None."""
    if isinstance(image, bytes):
        try:
            rgb = open_image(image, where).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise InputError(f"{where}: broken image ({error}); {REMEDY}") from error
    elif getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{where}: an image must be JPEG, PNG or a uint8 array (H, W, 3)")
    else:
        rgb = Image.fromarray(image)
    if size and rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def encode_frame(image: bytes | np.ndarray, size: int | None, where: str) -> bytes:
    """Return JPEG bytes; a JPEG that has the size already passes through undecoded."""
    if isinstance(image, bytes):
        opened = open_image(image, where)
        fits = size is None or opened.size == (size, size)
        if fits and opened.format == "JPEG" and opened.mode == "RGB":
            return image
    buffer = io.BytesIO()
    Image.fromarray(decode_frame(image, size, where)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_episode(
    path: str | Path, frames: Any, actions: np.ndarray, metadata: dict, size: int | None = None
) -> dict:
    """Write one episode to .../NNNNNNNNN.safetensors; return its entry for `append_index`.

    frames    (T,) or (V, T)  of JPEG or PNG bytes or uint8 (H, W, 3), as lists or an array
    actions   (T, 10)         finite
    metadata  language, success (True, False, None), fps, source; views: camera numbers if not 0...
    size      resize the frames unless they have this side already
    """
    frames = list(frames)
    if frames and not isinstance(frames[0], (list, tuple)) and np.ndim(frames[0]) != 4:
        frames = [frames]
    actions, counts = np.asarray(actions, np.float32), {len(view) for view in frames}
    if not len(actions) or counts != {len(actions)} or actions.shape[1:] != (ACTION_DIM,):
        raise InputError(
            f"{path}: {sorted(counts)} frames and actions {actions.shape}; give each frame one "
            f"action of width {ACTION_DIM}"
        )
    if not np.isfinite(actions).all():
        row = int(np.argwhere(~np.isfinite(actions))[0, 0])
        raise InputError(f"{path}: action {row} is not finite; mend or leave out this episode")
    jpegs = [encode_frame(frame, size, str(path)) for view in frames for frame in view]
    metadata = {"language": "", "success": None, "views": list(range(len(frames))), **metadata}
    tensors = {
        "jpeg": torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8),
        "offsets": torch.tensor(np.cumsum([0, *map(len, jpegs)])),  # (V T + 1,), view by view
        "actions": torch.from_numpy(actions),
    }
    save_tensors(path, tensors, metadata)
    entry = {key: metadata[key] for key in ("views", "success", "language")}
    return {"number": int(Path(path).stem), "length": len(actions), **entry}


class Episode:
    """One episode file, open: actions and metadata are read, frames only when asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingFileError(f"{path}: no such episode; {REMEDY}")
        try:
            file = safe_open(str(path), framework="numpy")
            self.metadata = json.loads(file.metadata()["metadata"])
            self.views = list(self.metadata["views"])
            self.actions, self.offsets = file.get_tensor("actions"), file.get_tensor("offsets")
            self.jpeg, ends = file.get_slice("jpeg"), self.offsets
            kinds = self.actions.dtype, ends.dtype, self.jpeg.get_dtype()
            sound = kinds == (np.float32, np.int64, "U8") and np.isfinite(self.actions).all()
            sound &= self.actions.shape[1:] == (ACTION_DIM,) and len(self.actions) > 0
            sound &= ends.shape == (len(self.views) * len(self.actions) + 1,) and ends[0] == 0
            sound &= bool((np.diff(ends) > 0).all()) and [ends[-1]] == self.jpeg.get_shape()
        except (SafetensorError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
            raise InputError(f"{path}: not an episode file ({error!r}); {REMEDY}") from error
        if not sound:
            raise InputError(f"{path}: damaged actions or frame offsets; {REMEDY}")

    def __len__(self) -> int:
        return len(self.actions)

    def jpeg_bytes(self, t: int, view: int = 0) -> bytes:
        """Read the JPEG of frame `t` of camera number `view`, and no other bytes."""
        if view not in self.views:
            raise InputError(f"{self.path}: has views {self.views}, not {view}; choose among them")
        row = self.views.index(view) * len(self) + int(t)
        return self.jpeg[int(self.offsets[row]) : int(self.offsets[row + 1])].tobytes()

    def frames(self, times: Iterable[int], views: Iterable[int], size: int | None) -> np.ndarray:
        """Decode frames to uint8 (V, T, H, W, 3)."""
        where, (times, views) = str(self.path), (list(times), list(views))
        out = None
        for v, view in enumerate(views):
            for i, t in enumerate(times):
                frame = decode_frame(self.jpeg_bytes(t, view), size, where)
                out = (
                    np.empty((len(views), len(times), *frame.shape), np.uint8)
                    if out is None
                    else out
                )
                if frame.shape != out.shape[2:]:
                    raise InputError(
                        f"{where}: frames differ in size; {REMEDY} with one image_size"
                    )
                out[v, i] = frame
        return out


def read_episode(path: str | Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """Read a whole file: frames uint8 (T, H, W, 3) or (V, T, H, W, 3), actions, metadata."""
    episode = Episode(path)
    frames = episode.frames(range(len(episode)), episode.views, None)
    return frames[0] if len(frames) == 1 else frames, episode.actions, episode.metadata


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


def read_index(folder: str | Path) -> tuple[dict, list[dict]]:
    """Read `folder/index.jsonl`: the description, then one record a shard."""
    path = Path(folder) / "index.jsonl"
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such data set; convert it with: python data.py --dataset_name "
            f"{path.parent.name} --output_dir {path.parent.parent}"
        )
    try:
        header, *records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        for key, kind in (("fps", (int, float)), ("action_mapping", str)):
            if not isinstance(header[key], kind):
                raise TypeError(f"{key} is {header[key]!r}")
        for entry in [e for r in records for es in r["episodes"].values() for e in es]:
            if not isinstance(entry["number"], int) or entry["length"] < 1 or not entry["views"]:
                raise ValueError(f"entry {entry}")
        return header, list({record["shard"]: record for record in records}.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged index ({error!r}); {REMEDY}") from error


def read_split(folder: str | Path, split: str) -> tuple[dict, list[dict]]:
    """Return the description of a data set and the index entries of one split."""
    header, records = read_index(folder)
    return header, [entry for record in records for entry in record["episodes"].get(split, ())]


# ------------------------------------------------------------------------------------------------
# Clips: which frames of which episode, in which order.

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
        if self.action_merge not in ("drop", "sum"):
            raise InputError(f"action_merge is {self.action_merge!r}; use drop or sum")
        if self.sampling not in SAMPLINGS:
            raise InputError(f"sampling is {self.sampling!r}; use one of {', '.join(SAMPLINGS)}")
        if not 0 <= self.num_history < self.num_frames or min(self.stride, self.image_size) < 1:
            raise InputError("need 0 <= num_history < num_frames, stride >= 1, image_size >= 1")


def probe_frames(length: int, num_frames: int, sampling: str, fps: float) -> np.ndarray:
    """Choose frames that show how an episode ends; the last frame is always among them.

    length 40, 8 frames, 5 fps:
    uniform      0  6 11 17 22 28 33 39   evenly over all
    fps_1        4  9 14 19 24 29 34 39   one a second up to the end (closer if it is too short)
    bookend      0  1  2  3 36 37 38 39   half of them at each end
    final_heavy  0 10 20 24 28 31 35 39   a quarter of them for the first half, the rest after it
    """
    last, early = length - 1, num_frames // 4 if sampling == "final_heavy" else 0
    if sampling == "fps_1":
        step = min(max(1, round(fps)), last // max(1, num_frames - 1))
        return last - step * np.arange(num_frames)[::-1]
    if sampling == "bookend":
        head = num_frames // 2
        return np.r_[:head, length - num_frames + head : length]
    middle = length / 2 if early else 0
    first, rest = np.arange(early) * middle / max(1, early), num_frames - early
    return np.rint(np.r_[first, np.linspace(middle, last, rest)]).astype(np.int64)


def draw_frames(
    length: int, num_frames: int, num_history: int, stride: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw a clip of variable history; a clip that does not fit is not drawn, nothing is clamped.

    The future lies s apart, s in {stride, 2 stride}, from the current frame on; the history
    reaches back from it in steps of 4 s. In 15 % of the clips, and where no s fits, it repeats the
    current frame. [arXiv 2605.06388, released code, without its clamping]

    length 38, T 10, H 2, stride 2: s = 4 needs (4*2 + 7) * 4 + 1 = 61 frames, so s = 2 with 31;
    the current frame is one of 16..23, and 16 gives  0 8 | 16 18 20 22 24 26 28 30.
    """
    future = num_frames - num_history - 1
    back = 0 if rng.random() < 0.15 else 4
    strides = [s for s in (stride, 2 * stride) if (back * num_history + future) * s < length]
    if not strides:
        back, strides = 0, [s for s in (stride, 2 * stride) if future * s < length]
    s = int(rng.choice(strides))
    current = int(rng.integers(back * s * num_history, length - future * s))
    return np.r_[
        current - back * s * np.arange(num_history, 0, -1), current + s * np.arange(future + 1)
    ]


def merge_actions(actions: np.ndarray, times: np.ndarray, merge: str) -> np.ndarray:
    """Give each kept frame its own action ("drop") or the sum up to the next kept one ("sum").

    A sum takes the last gripper command; the last frame's spans as many steps as the one before,
    as far as the episode goes. A repeated frame has not moved: zeros and its gripper.
    """
    merged = actions[times]
    if merge == "sum":
        ends = [*times[1:], 2 * times[-1] - times[-2]] if len(times) > 1 else times + 1
        for row, start, end in zip(merged, times, ends, strict=True):
            span = actions[start:end]
            row[:6], row[7:] = span[:, :6].sum(axis=0), span[:, 7:].sum(axis=0)
            row[6] = span[-1, 6] if len(span) else row[6]
    return merged


# ------------------------------------------------------------------------------------------------
# Latent cache: what a frozen encoder made of every frame, in bfloat16.


def _cache(config: DataConfig, folder: Path, split: str, latents: str) -> tuple[Path, dict]:
    """Return the cache's folder and what its marker file must say."""
    _, entries = read_split(folder, split)
    entries = [e for e in entries if set(config.views) <= set(e["views"])]
    key = {"fingerprint": latents, "image_size": config.image_size, "views": list(config.views)}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    key["episodes"] = sorted([e["number"], e["length"]] for e in entries)
    return folder / split / "latents" / name, key


def write_latent_cache(
    config: DataConfig,
    split: str,
    latents: str,
    encode: Callable[[torch.Tensor], torch.Tensor],
    shard: tuple[int, int] = (0, 1),
    chunk: int = 32,
) -> None:
    """Encode every frame of the config's data sets once; a killed run continues where it was.

    latents  fingerprint of everything that shapes a latent: encoder, its weights, adapter
    encode   (1, T, H, W, 3) in [0, 1] -> (1, T, h, w, C), called with at most `chunk` frames
    shard    (rank, world): this process encodes its part; whoever sees all parts there, says so
    """
    for name in map(str.strip, config.subset_names.split(",")):
        folder = Path(config.dataset_dir) / name
        target, marker = _cache(config, folder, split, latents)
        todo = [target / f"{number:09d}.safetensors" for number, _ in marker["episodes"]]
        for path in tqdm(todo[shard[0] :: shard[1]], f"cache {name}/{split}", disable=shard[0] > 0):
            if path.exists():
                continue
            episode, z = Episode(folder / split / path.name), []
            for view in config.views:
                for t in range(0, len(episode), chunk):
                    times = range(t, min(t + chunk, len(episode)))
                    frames = episode.frames(times, [view], config.image_size)
                    z.append(encode(torch.from_numpy(frames).float() / 255)[0].bfloat16().cpu())
            z = torch.cat(z).unflatten(0, (len(config.views), len(episode)))
            save_tensors(path, {"z": z}, {"fingerprint": latents})
        if all(path.exists() for path in todo):
            write_atomic(target / "complete.json", json.dumps(marker).encode())


def find_latent_cache(config: DataConfig, folder: Path, split: str, latents: str) -> Path:
    """Return the cache's folder; raise InputError unless it is complete, of just these episodes."""
    target, marker = _cache(config, folder, split, latents)
    try:
        found = json.loads((target / "complete.json").read_bytes())
    except (OSError, ValueError):
        found = None
    if found != marker:
        state = "no complete" if found is None else "a stale"
        raise InputError(
            f"{target}: {state} latent cache of {folder.name}/{split} for this encoder; write it "
            "with train_dit.py --cache_latents True"
        )
    return target


def read_latents(path: Path, times: np.ndarray, shape: tuple[int, int], latents: str):
    """Read the latents of a clip's frames, and no other bytes: (V, T, h, w, C) float32.

    shape  (V, T) of the whole episode, which the file must have
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: cached latents are gone; write the cache again")
    try:
        with safe_open(str(path), framework="pt") as file:
            rows, found = file.get_slice("z"), json.loads(file.metadata()["metadata"])
            sound = rows.get_dtype() == "BF16" and len(rows.get_shape()) == 5
            if not sound or (*rows.get_shape()[:2], found["fingerprint"]) != (*shape, latents):
                raise ValueError(f"{rows.get_dtype()} {rows.get_shape()} of {found['fingerprint']}")
            return torch.cat([rows[:, t : t + 1] for t in times.tolist()], dim=1).float()
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path}: damaged or stale latents ({error!r}); cache again") from error


# ------------------------------------------------------------------------------------------------
# Clips, served.


class Clip(NamedTuple):
    """One item of an EpisodeDataset; `frames` are latents (T, h, w, C) where it serves a cache."""

    frames: torch.Tensor  # (T, H, W, 3), or (V, T, H, W, 3) for several views, in [0, 1]
    actions: torch.Tensor  # (T, A)


class EpisodeDataset(torch.utils.data.Dataset):
    """Serve clips of one split of the config's data sets; a clip is a pure function of its key.

    dataset[i]        clip of the i-th kept episode, starting where (seed, 0, i) says
    dataset[draw, i]  the same episode at another start; ClipSampler counts `draw` up every epoch
    latents           fingerprint of the latent cache to serve instead of frames

    Opening reads the index only; an item opens its own file and reads its own frames' bytes.
    Raises InputError where a data set, a usable episode or a complete cache is missing.
    """

    def __init__(self, config: DataConfig, split: str, latents: str | None = None):
        self.config, self.split, self.latents = config, split, latents
        self.variable = config.variable_history and split == "train"
        shortest = (config.num_frames - 1) * config.stride + 1
        shortest = shortest if config.sampling == "stride" else config.num_frames
        self.dropped = {"too short": 0, "missing view": 0}
        self.headers, self.entries, self.sizes, self.caches = [], [], [], {}
        for name in map(str.strip, config.subset_names.split(",")):
            folder = Path(config.dataset_dir) / name
            if name in ("", ".", "..") or folder.name != name:
                raise InputError(f"subset_names: {name!r} is not the name of a data set")
            header, entries = read_split(folder, split)
            kept = [(folder / split, e) for e in entries if not self._drops(e, shortest)]
            if not kept:
                raise InputError(
                    f"{folder}: split {split!r} has {len(entries)} episodes but none to use (dropped "
                    f"{self.dropped}); convert more, shorten the clips or take other views"
                )
            if latents is not None:
                self.caches[folder / split] = find_latent_cache(config, folder, split, latents)
            self.headers.append(header)
            self.entries += kept
            self.sizes.append(len(kept))
        self.fps = min(header["fps"] for header in self.headers)
        self.action_mapping = "+".join(sorted({h["action_mapping"] for h in self.headers}))

    def _drops(self, entry: dict, shortest: int) -> bool:
        if not set(self.config.views) <= set(entry["views"]):
            self.dropped["missing view"] += 1
        elif entry["length"] < shortest:
            self.dropped["too short"] += 1
        else:
            return False
        return True

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
            times = probe_frames(length, config.num_frames, config.sampling, self.fps)
        elif self.variable:
            clip = config.num_frames, config.num_history, config.stride
            times = draw_frames(length, *clip, rng)
        else:
            times = config.stride * np.arange(config.num_frames)
            times += rng.integers(length - times[-1])
        return {**entry, "path": folder / f"{entry['number']:09d}.safetensors", "times": times}

    def __getitem__(self, key: int | tuple[int, int]) -> Clip:
        config, info = self.config, self.info(key)
        episode = Episode(info["path"])
        if len(episode) != info["length"]:
            raise InputError(f"{episode.path}: {len(episode)} frames, not as indexed; {REMEDY}")
        if self.latents is None:
            frames = episode.frames(info["times"], config.views, config.image_size)
            frames = torch.from_numpy(np.divide(frames, 255, dtype=np.float32))
        else:
            path = self.caches[episode.path.parent] / episode.path.name
            shape = len(config.views), len(episode)
            frames = read_latents(path, info["times"], shape, self.latents)
        actions = merge_actions(episode.actions, info["times"], config.action_merge)
        return Clip(frames[0] if len(frames) == 1 else frames, torch.from_numpy(actions))


class ClipSampler(torch.utils.data.Sampler):
    """Yield batches of keys for ever: a DataLoader's `batch_sampler`, sharded and resumable.

    The keys form one endless sequence given by the config's seed: epoch after epoch, each freshly
    shuffled and as long as the data sets together; `subset_weights` set each one's share. Global
    batch n is the slice n G ... (n + 1) G with G = world * batch_size, and rank r takes its r-th
    part: N processes with batch b see what one with batch N b sees, and no batch is uneven.

    start  number of batches taken before: resumes in the middle of an epoch
    """

    def __init__(
        self, dataset: EpisodeDataset, batch_size: int, rank: int = 0, world: int = 1, start=0
    ):
        self.sizes, self.seed, self.start = dataset.sizes, dataset.config.seed, start
        self.batch_size, self.rank, self.world = batch_size, rank, world
        weights = [float(w) for w in dataset.config.subset_weights.split(",") if w.strip()]
        if weights and (len(weights) != len(self.sizes) or min(weights) <= 0):
            raise InputError("subset_weights: give one positive number per data set")
        share = np.array(weights or self.sizes) / sum(weights or self.sizes)
        self.counts = np.maximum(1, np.rint(share * sum(self.sizes))).astype(np.int64).tolist()
        self.epoch_length = sum(self.counts)  # clips, over all processes
        self.epoch, self.keys = -1, np.zeros((0, 2), np.int64)

    def order(self, epoch: int) -> np.ndarray:
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
        first, batch = (number * self.world + self.rank) * self.batch_size, []
        for position in range(first, first + self.batch_size):
            epoch, i = divmod(position, self.epoch_length)
            if epoch != self.epoch:
                self.epoch, self.keys = epoch, self.order(epoch)
            batch.append(tuple(self.keys[i].tolist()))
        return batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.batch, itertools.count(self.start))
