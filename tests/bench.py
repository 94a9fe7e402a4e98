"""Measure by hand what must be fast: ratios in one run, absolute times beside them.

    python tests/bench.py                        # all sections
    python tests/bench.py train rollout          # some of them
    python tests/bench.py train --size T --channels 24 --grid 8 --frames 6 --batch 16

Every section is a function `section(args)` that prints table rows; `SECTIONS` lists them.
"""

import argparse
import functools
import itertools
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffusion import FlowMatching, time_shift
from dit import DIT_SIZES, DiT, DiTConfig, timestep_embedding


def alternate(
    variants: dict[str, Callable], rounds: int, clock: Callable = time.perf_counter
) -> dict[str, float]:
    """Time variants in turns, so that other load hits all alike: {name: median seconds}."""
    for run in variants.values():  # warm up: compile, fill caches
        run()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(*cells) -> None:
    print(
        "  " + "  ".join(f"{cell:<34}" if i == 0 else f"{cell:>12}" for i, cell in enumerate(cells))
    )


def build(args, **fields) -> DiT:
    """Build the model under test with weights that are not zero anywhere."""
    torch.manual_seed(0)
    config = DIT_SIZES[args.size] | dict(max_frames=args.frames) | fields
    dit = DiT(DiTConfig(args.channels, 1, **config))
    for name, parameter in dit.named_parameters():
        if "adaLN" in name or "final_layer" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return dit


# ------------------------------------------------------------------------------------------------
# The plain implementation: what one writes first, with the weights of ours.


def plain_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def plain_rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., L, E), angles (L, E/2)."""
    x0, x1 = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1).flatten(-2)


def plain_linear(layer, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def plain_block(block, x: Tensor, c: Tensor, angles: Tensor, causal: bool) -> Tensor:
    """x (batch, L, D), c (batch, L or 1, D)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = plain_linear(
        block.adaLN_modulation[1], F.silu(c)
    ).chunk(6, -1)
    y = plain_norm(x, 1e-6) * (1 + scale1) + shift1
    q, k, v = plain_linear(block.attn.qkv_proj, y).chunk(3, -1)
    q, k, v = (z.unflatten(-1, (block.heads, -1)).transpose(1, 2) for z in (q, k, v))
    q, k = (plain_rotate(plain_norm(z, 1.19e-7), angles) for z in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + gate1 * plain_linear(block.attn.out_proj, y.transpose(1, 2).reshape(x.shape))
    y = plain_norm(x, 1e-6) * (1 + scale2) + shift2
    gate, value = plain_linear(block.ffwd.w12, y).chunk(2, -1)
    return x + gate2 * plain_linear(block.ffwd.w3, F.silu(gate) * value)


def plain_forward(dit: DiT, z: Tensor, tau: Tensor, actions: Tensor) -> Tensor:
    """Run a factored single-view DiT with patch 1 and the plain head."""
    B, T, h, w, C = z.shape
    N, E = h * w, dit.config.dim // dit.config.heads
    c = dit.timestep_mlp(timestep_embedding(tau)) + dit.action_embedder(actions)
    x = F.linear(z.reshape(B, T, N, C), dit.x_proj.weight.flatten(1), dit.x_proj.bias)
    quarter = 10000 ** (-torch.arange(E // 4) / (E // 4))
    rows = (torch.arange(h)[:, None] * quarter)[:, None].expand(h, w, -1)
    columns = (torch.arange(w)[:, None] * quarter).expand(h, w, -1)
    space = torch.cat((rows, columns), -1).reshape(N, E // 2)
    times = torch.arange(T)[:, None] * 10000 ** (-torch.arange(E // 2) / (E // 2))
    for layer in dit.blocks:
        x = x.reshape(B * T, N, -1)
        x = plain_block(layer.s_block, x, c.reshape(B * T, 1, -1), space, causal=False)
        x = x.reshape(B, T, N, -1).transpose(1, 2).reshape(B * N, T, -1)
        c_time = c[:, None].expand(B, N, T, -1).reshape(B * N, T, -1)
        x = plain_block(layer.t_block, x, c_time, times, causal=True)
        x = x.reshape(B, N, T, -1).transpose(1, 2)
    head = dit.final_layer
    shift, scale = plain_linear(head.adaLN_modulation[1], F.silu(c))[:, :, None].chunk(2, -1)
    return plain_linear(head.linear, plain_norm(x, 1e-6) * (1 + scale) + shift).reshape(z.shape)


# ------------------------------------------------------------------------------------------------
# Sections.


def train_step(args, kind: str) -> Callable[[], None]:
    """Build one training step: loss, backward, AdamW. kind: plain | ours | compiled."""
    dit = build(args, action_dropout=0.0).train()
    net = dit if kind != "compiled" else torch.compile(dit, fullgraph=True)
    if kind == "plain":
        net = lambda *inputs: plain_forward(dit, *inputs)  # noqa: E731
    adam = torch.optim.AdamW(dit.parameters(), lr=1e-5, fused=kind != "plain")
    objective = FlowMatching(shift=time_shift(args.grid**2, args.channels))
    z = torch.randn(args.batch, args.frames, args.grid, args.grid, args.channels)
    actions = torch.randn(args.batch, args.frames, 10)

    def step():
        adam.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, _ = objective.loss(net, z, actions, 2)
        loss.backward()
        adam.step()

    return step


def train(args) -> None:
    """Time a training step against the plain eager implementation; peak memory of each alone."""
    kinds = ["plain", "ours", "compiled"]
    seconds = alternate({kind: train_step(args, kind) for kind in kinds}, args.rounds)
    row("training step", "seconds", "x plain", "peak GB")
    for kind in kinds:
        options = [word for word in sys.argv[1:] if word not in SECTIONS]
        command = [sys.executable, __file__, "peak", "--kind", kind, *options]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ratio = seconds[kind] / seconds["plain"]
        row(kind, f"{seconds[kind]:.3f}", f"{ratio:.2f}", out.split()[-1])


def peak(args) -> None:
    """Print the peak resident memory of two training steps, the interpreter included."""
    step = train_step(args, args.kind)
    for _ in range(2):
        step()
    words = Path("/proc/self/status").read_text().split()  # getrusage counts the parent's peak too
    print(f"{int(words[words.index('VmHWM:') + 1]) / 2**20:.2f}")


def profile(args) -> None:
    """Show where the time of a training step goes, by operator."""
    for kind in ("plain", "ours"):
        step = train_step(args, kind)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        row(f"{kind}: operator", "ms", "%", "calls")
        for event in events[: args.rows]:
            ms, share = event.self_cpu_time_total / 1e3, event.self_cpu_time_total / total
            row(event.key[:34], f"{ms:.1f}", f"{100 * share:.1f}", event.count)


def rollout(args) -> None:
    """Time a frame at a full window: everything run again, exact cache, rolling cache."""
    objective = FlowMatching(shift=time_shift(args.grid**2, args.channels))
    z = torch.randn(1, args.frames, args.grid, args.grid, args.channels)

    def run(model: Callable, frames: int, context: str) -> Callable[[], None]:
        actions = torch.zeros(1, args.frames + frames, 10)
        return lambda: objective.rollout(model, z, actions, frames, context=context)

    for dtype in (torch.float32, torch.bfloat16):
        dit = build(args).eval().to(dtype)
        plain = functools.partial(DiT.forward, dit)  # no cache methods
        plain.config = dit.config
        variants = {
            "uncached": run(plain, 1, "exact"),
            "first": run(dit, 1, "exact"),  # fills the window, as every rollout does once
            "exact": run(dit, 3, "exact"),
            "rolling": run(dit, 3, "rolling"),
        }
        seconds = alternate(variants, args.rounds)
        row(f"rollout, {str(dtype)[6:]}", "s a frame", "x faster")
        row("uncached", f"{seconds['uncached']:.3f}", "1.00")
        for name in ("exact", "rolling"):
            steady = (seconds[name] - seconds["first"]) / 2
            row(name, f"{steady:.3f}", f"{seconds['uncached'] / steady:.2f}")


def plan(args) -> None:
    """Time a candidate of k actions behind two frames: everything run again, shared cache."""
    from world_model import candidate_cost

    objective = FlowMatching(shift=time_shift(args.grid**2, args.channels))
    dit, z = build(args).eval(), torch.randn(6, args.grid, args.grid, args.channels)
    plain = functools.partial(DiT.forward, dit)  # no cache methods
    plain.config = dit.config
    row("planning, float32", "s a candidate", "x faster")
    for k, count in ((1, 8), (4, 2)):
        candidates, task = torch.randn(count, k, 10), (z[:2], torch.zeros(1, 10), z[2 : 2 + k])
        variants = {
            f"k={k} {name}": functools.partial(
                candidate_cost(model, objective, *task, torch.randn_like(z[:k])), candidates
            )
            for name, model in (("uncached", plain), ("cached", dit))
        }
        seconds = alternate(variants, args.rounds)
        for name, each in seconds.items():
            row(name, f"{each / count:.2f}", f"{seconds[f'k={k} uncached'] / each:.2f}")


def clips_and_shards(args) -> None:
    """Time what feeds training: clips against MP4, conversion, checksums, latent cache."""
    with tempfile.TemporaryDirectory() as folder:
        episodes = robot_episodes(Path(folder))
        write_episodes(Path(folder, "robot"), episodes)
        write_episodes(Path(folder, "one"), episodes[:1])
        clips(args, Path(folder), episodes)
        conversion(args, Path(folder), episodes[0])
        for size in ("T", "S"):
            cached_steps(argparse.Namespace(**{**vars(args), "size": size}), Path(folder))


def robot_episodes(folder: Path) -> list[list[bytes]]:
    """Return JPEGs of episodes: real Bridge ones where they are, else a noisy camera's."""
    from test_data import jpeg

    import data

    real, rng = Path(data.__file__).parents[1] / "shared/data/bridge_real", np.random.default_rng(0)
    if real.is_dir():
        data.convert(data.Args(output_dir=str(folder / "real"), source=str(real)))
        found = [data.Episode(path) for path in (folder / "real").rglob("train/*.safetensors")]
        return [[episode.jpeg_bytes(t) for t in range(len(episode))] for episode in found]
    wide = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(wide).resize((512, 512), Image.Resampling.BICUBIC))
    moved = [wide[3 * t :][:256, 2 * t :][:, :256] for t in range(38)]
    noisy = [np.clip(frame + rng.normal(0, 8, frame.shape), 0, 255) for frame in moved]
    return [[jpeg(frame.astype(np.uint8)) for frame in noisy]]


def write_episodes(folder: Path, episodes: list[list[bytes]]) -> None:
    """Write a data set of these frames, with actions of zeros."""
    import data

    entries = []
    for i, frames in enumerate(episodes):
        path = folder / f"train/{i:09d}.safetensors"
        entries.append(data.write_episode(path, frames, np.zeros((len(frames), 10)), {}))
    data.append_index(folder, {"fps": 5, "action_mapping": "bridge"})
    data.append_index(folder, {"shard": "a", "episodes": {"train": entries}})


def clips(args, folder: Path, episodes: list[list[bytes]]) -> None:
    """Time training clips (10 frames at stride 2, anywhere in an episode) against H.264 MP4.

    Both sides open the file, decode, and end with the ten frames as float32 in [0, 1]. Decoding an
    MP4 begins at its only key frame, the first, as x264 writes it; frames between are decoded but
    not converted. Episode files keep the JPEGs bit for bit; an MP4 of small loss costs more.
    """
    import data

    dataset = data.EpisodeDataset(data.DataConfig(str(folder), "robot"), "train")
    draws = itertools.count()

    def key():
        return divmod(next(draws), len(dataset))

    def video(crf: int) -> None:
        info = dataset.info(key())
        first = int(info["times"][0])
        with av.open(str(folder / f"{info['number']}-{crf}.mp4")) as opened:
            span = itertools.islice(opened.decode(video=0), first, first + 19, 2)
            kept = np.stack([frame.to_ndarray(format="rgb24") for frame in span])
        torch.from_numpy(kept).float().div_(255)

    variants = {"episode file, exact": lambda: dataset[key()]}
    try:
        import av
    except ImportError:
        row("no PyAV here: no comparison with MP4")
    else:
        for crf in (23, 18, 10):  # 23 is x264's default
            errors = []
            for i, jpegs in enumerate(episodes):
                frames = [data.decode_frame(jpeg, None, "bench") for jpeg in jpegs]
                with av.open(str(folder / f"{i}-{crf}.mp4"), "w") as out:
                    stream = out.add_stream("libx264", rate=5, options={"crf": str(crf)})
                    stream.width, stream.height = 256, 256
                    for frame in frames:
                        out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                    out.mux(stream.encode())
                with av.open(str(folder / f"{i}-{crf}.mp4")) as opened:
                    kept = [x.to_ndarray(format="rgb24") for x in opened.decode(video=0)]
                errors.append(np.square(np.subtract(kept, frames, dtype=np.float32)).mean())
            psnr = 10 * np.log10(255**2 / np.mean(errors))
            variants[f"MP4, crf {crf}, {psnr:.1f} dB"] = functools.partial(video, crf)
    wall = alternate(variants, 20 * args.rounds)
    busy = alternate(variants, 20 * args.rounds, time.process_time)
    size = sum(map(len, itertools.chain(*episodes))) / sum(map(len, episodes)) / 1e3
    print(f"  {len(episodes)} episodes, JPEGs of {size:.0f} KB; both sides end with floats")
    row("a clip of 10 frames, 256 px", "ms", "x file", "ms of CPU", "x file")
    first = next(iter(variants))
    for name in variants:
        times = [(clock[name], clock[name] / clock[first]) for clock in (wall, busy)]
        row(name, *(f"{x:.1f}" for ms, ratio in times for x in (1e3 * ms, ratio)))

    def loader(as_stored: bool) -> Callable:
        served = data.EpisodeDataset(dataset.config, "train", as_stored=as_stored)
        options = {"sampler": data.ClipSampler(served, 4), "batch_size": None, "num_workers": 2}
        batches = iter(torch.utils.data.DataLoader(data.BatchDataset(served), **options))
        return lambda: [next(batches) for _ in range(16)]  # more than are fetched in advance

    kinds = alternate({"floats": loader(False), "uint8": loader(True)}, args.rounds)
    row("four clips from two processes", "ms", "x uint8")
    for name, seconds in kinds.items():
        row(name, f"{1e3 * seconds / 16:.1f}", f"{seconds / kinds['uint8']:.1f}")


def conversion(args, folder: Path, frames: list[bytes]) -> None:
    """Time converting six shards of 16 episodes against copying what came out."""
    import test_data
    from test_data import bridge_example

    import data

    def framed(payload: bytes) -> bytes:  # the tests' own checksum goes bit by bit
        parts = len(payload).to_bytes(8, "little"), payload
        return b"".join(part + data.masked_crc32c(part).to_bytes(4, "little") for part in parts)

    test_data.framed, example = framed, bridge_example(0, len(frames))
    for step, frame in zip(example["steps"], frames, strict=True):
        step["observation"]["image_0"] = frame
    source = test_data.write_rlds(
        folder / "rlds", {"train": [[example] * 16] * 6, "val": [[example]]}
    )
    megabytes = sum(p.stat().st_size for p in source.glob("*tfrecord*")) / 1e6
    start = time.perf_counter()
    data.convert(data.Args(output_dir=str(folder), source=str(source)))
    converted = time.perf_counter() - start
    start = time.perf_counter()
    for episode in (folder / "bridge_v2").glob("*/*.safetensors"):
        data.write_atomic(folder / "copy" / episode.name, episode.read_bytes())
    copied, content = time.perf_counter() - start, next(source.glob("*tfrecord*")).read_bytes()
    checked = alternate({"crc": lambda: data.masked_crc32c(content)}, args.rounds)["crc"]
    row(f"{megabytes:.0f} MB of shards", "MB/s")
    row("convert", f"{megabytes / converted:.0f}")
    row("copy and fsync the same files", f"{megabytes / copied:.0f}")
    row("CRC-32C alone", f"{len(content) / 1e6 / checked:.0f}")


def cached_steps(args, folder: Path) -> None:
    """Time a training step fed by the latent cache against a ViT-L encoding the same clips."""
    import data

    layer = torch.nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True, norm_first=True)
    vit = torch.nn.TransformerEncoder(layer, 24, enable_nested_tensor=False).eval()
    patches, narrow = torch.nn.Linear(768, 1024), torch.nn.Linear(1024, args.channels)

    @torch.no_grad()
    def encode(frames):
        x = frames[0].unflatten(1, (16, 16)).unflatten(3, (16, 16)).transpose(2, 3)
        z = narrow(vit(patches(x.reshape(-1, 256, 768))))
        return z.unflatten(1, (16, 16))[None]

    config = data.DataConfig(str(folder), "one")
    data.write_latent_cache(config, "train", f"bench {args.size}", encode)
    cached = data.EpisodeDataset(config, "train", f"bench {args.size}")
    dataset, draws = data.EpisodeDataset(config, "train"), itertools.count()
    step, stored = train_step(args, "ours"), [dataset[i, 0].frames[None] for i in range(args.batch)]
    variants = {
        "read latents": lambda: [cached[next(draws), 0] for _ in range(args.batch)],
        "read and decode frames": lambda: [dataset[next(draws), 0] for _ in range(args.batch)],
        "encode them with ViT-L": lambda: [encode(frames) for frames in stored],
        "train the DiT on latents": step,
    }
    read, decode, encoded, trained = alternate(variants, args.rounds).values()
    row(f"DiT-{args.size}, {args.batch} clips of 10 frames", "seconds", "x cache")
    for name, each in zip(variants, (read, decode, encoded, trained), strict=True):
        row(name, f"{each:.3f}")
    row("step from the cache", f"{read + trained:.3f}", "1.0")
    whole = decode + encoded + trained
    row("step, ViT-L on the fly", f"{whole:.3f}", f"{whole / (read + trained):.1f}")


def vit_large(args) -> None:
    """Time V-JEPA 2.1 ViT-L on 256 px frames against a plain ViT of its size, and its matmuls."""
    from test_encoders import vjepa_state

    from encoders import EncoderConfig, create_autoencoder

    D, depth, n, heads = 1024, 24, 256, 16
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"ema_encoder": vjepa_state(D, depth, 4 * D)}, f"{folder}/vitl.pt")
        encoder = create_autoencoder(EncoderConfig("vjepa2", f"{folder}/vitl.pt"))
    encoder.dtype = torch.bfloat16 if args.bf16 else torch.float32
    frames = torch.randint(0, 256, (1, args.frames, 256, 256, 3), dtype=torch.uint8)
    encoder.encode(frames[:, :1])  # settles the dtype
    weights = dict(encoder.network.named_buffers())
    x, images = torch.randn(args.frames, n, D), torch.randn(args.frames, 3, 1, 256, 256)

    def embed(images):
        name = "patch_embed_img.proj"
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.conv3d(images, weight, bias, stride=(1, 16, 16)).flatten(2).mT.contiguous()

    def layer(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attend(qkv):
        return F.scaled_dot_product_attention(
            *qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        )

    @torch.no_grad()
    def plain(norms=True):
        """The same weights without rotation or uint8 frames; norms=False: products alone."""
        y = embed(images.to(encoder.dtype)) if norms else x.to(encoder.dtype)
        for i in range(depth):
            norm = (lambda y: F.layer_norm(y, (D,))) if norms else (lambda y: y)
            a = attend(layer(f"blocks.{i}.attn.qkv", norm(y))).transpose(1, 2).flatten(2)
            a = layer(f"blocks.{i}.attn.proj", a)
            y = y + a if norms else a
            a = layer(f"blocks.{i}.mlp.fc1", norm(y))
            a = layer(f"blocks.{i}.mlp.fc2", F.gelu(a) if norms else a)
            y = y + a if norms else a

    variants = {"V-JEPA ViT-L, from uint8": lambda: encoder.encode(frames), "plain ViT-L": plain}
    variants["its matmuls and attention alone"] = lambda: plain(norms=False)
    seconds = alternate(variants, args.rounds)
    row(f"{args.frames} frames, {str(encoder.dtype)[6:]}", "seconds", "x plain", "images/s")
    for name, each in seconds.items():
        ratio = each / seconds["plain ViT-L"]
        row(name, f"{each:.2f}", f"{ratio:.2f}", f"{args.frames / each:.2f}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        encoder.encode(frames)
    products = ("mm", "convolution", "dot_product", "linear")
    share = {True: 0, False: 0}
    for event in profiler.key_averages():
        share[any(word in event.key for word in products)] += event.self_cpu_time_total
    row("share of matmuls and attention", f"{100 * share[True] / sum(share.values()):.0f} %")


SECTIONS = {
    "train": train,
    "rollout": rollout,
    "plan": plan,
    "profile": profile,
    "data": clips_and_shards,
    "vit": vit_large,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    parser.add_argument("--size", default="S", choices=DIT_SIZES)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--frames", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=15, help="operators shown by profile")
    parser.add_argument("--kind", default="ours", help="variant measured by peak")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "peak" in args.sections:
        return peak(args)
    print(f"torch {torch.__version__}, {platform.processor()}, {args.threads} threads, {args}")
    for name in args.sections:
        SECTIONS[name](args)
        print()


if __name__ == "__main__":
    main()
