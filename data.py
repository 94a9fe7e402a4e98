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
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors

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
