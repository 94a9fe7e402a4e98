"""Every shape that a comment or a docstring states is the shape that a small run has.

A shape stands behind the line that makes it, `x = ...  # (B, T, N, D)`, or in a docstring: behind
the names of arguments; behind an arrow or "to" for the result; else it is the first tensor's. What
a module's docstring says of a name holds for arguments of that name wherever nothing else is said.
In a run a letter is one number, or where the run gives `...` one number a call (T_ stands for T');
other names are whole numbers of the function itself.
"""

import ast
import functools
import math
import re
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import test_encoders
import torch
from PIL import Image

import adapter
import diffusion
import dit
import encoders
import train_adapter

MODULES = dit, diffusion, adapter, train_adapter, encoders
SHAPE = r"\((?:[^()]*,[^()]*|\.\.\.)\)"

# ------------------------------------------------------------------------------------------------
# The runs

RUNS = []


def run(module, *parts: str, results: bool = True, **letters):
    """Register what prepares and returns a run of a module, or of some functions and classes."""

    def register(prepare: Callable[[], Callable]) -> Callable[[], Callable]:
        RUNS.append((module, parts, results, letters, prepare))
        return prepare

    return register


DIT = dict(h=6, w=10, C=5, A=9, N=15, D=48, H=3, E=16, head_dim=40, p=2)


def small_dit(**fields) -> dit.DiT:
    sizes = dict(dim=48, depth=2, heads=3, action_dim=9, max_frames=8, head_dim=40)
    return dit.DiT(dit.DiTConfig(5, 2, **sizes | fields)).eval()


def clip(T: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, T, 6, 10, 5), torch.rand(2, T), torch.randn(2, T, 9)


@run(dit, **DIT, B=2, T=7, T_=7, half=...)
def whole_clips():
    models = [small_dit(), small_dit(temporal_mode="joint"), small_dit(wide_head=True)]
    rope, drop = (models[0].config, 0, 7, 6, 10, torch.device("cpu")), torch.tensor([True, False])
    return lambda: [dit.build_rope(*rope), *(model(*clip(7), drop) for model in models)]


@run(dit, "DiT", "attend_time", "attend_joint", **DIT, B=2, T=..., T_=...)
def frame_by_frame():
    def go():
        for model in (small_dit(), small_dit(temporal_mode="joint")):
            z, tau, actions = clip(4)
            cache = model.encode_context(z, tau, actions)
            model.denoise(z[:, :1], model.modulations(tau[:, :1], actions[:, :1]), cache)

    return go


@run(dit, "merge_views", "split_views", B=2, V=3, T=7, h=6, w=10, C=5)
def views():
    return lambda: dit.split_views(dit.merge_views(torch.empty(2, 3, 7, 6, 10, 5)), 3)


def dream(guidance: float) -> None:
    z, _, actions = clip(5)
    models = [lambda z, tau, actions: torch.zeros_like(z), small_dit(max_frames=4)]
    for objective in (diffusion.FlowMatching(steps=2), diffusion.DDPM(steps=2)):
        objective.loss(models[0], z, actions, 2)
        for model in models:
            objective.rollout(model, z[:, :2], actions, 3, guidance, noise=z[:, 2:])


@run(diffusion, B=2, T=..., h=6, w=10, C=5, A=9, n=..., k=..., num_frames=...)
def rollouts():
    return lambda: dream(1.0)


@run(diffusion, "null_action", "guide", B=..., T=..., h=6, w=10, C=5, A=9)
def guided_rollouts():
    return lambda: dream(2.0)


def small_adapter(**fields) -> adapter.Adapter:
    return adapter.create_adapter(adapter.AdapterConfig("svae", 8, 1, 4, **fields), 24)


@run(adapter, D=24, C=8, h=5, w=7, N=6)
def flat_adapters():
    refined, whitened = small_adapter(adapter_latent_layers=1), small_adapter(adapter_pca=True)
    begin = torch.zeros(24), torch.eye(24), torch.ones(24)
    z = torch.randn(2, 3, 5, 7, 24)
    return lambda: (refined.decode(refined.encode(z)), whitened.init_from_pca(*begin))


@run(adapter, D=24, C=8, h=5, w=7, N=6, mid=12)
def progressive_adapters():
    model = small_adapter(adapter_progressive=True, adapter_mid_dim=12, adapter_mid_heads=4)
    return lambda: model.decode(model.encode(torch.randn(2, 3, 5, 7, 24)))


def painter(**fields) -> adapter.PixelDecoder:
    config = adapter.PixelDecoderConfig(8, 12, (1, 2), 1, norm_groups=4, **fields)
    return adapter.PixelDecoder(config)


@run(adapter, "PixelDecoder", B=2, T=3, N=6, C=8, h=5, w=7, H=10, W=14, base=12)
def painting():
    return lambda: painter()(torch.randn(2, 3, 5, 7, 8))


@run(adapter, "PixelDecoder", B=2, T=3, N=12, C=8, h=5, w=7, H=10, W=14, base=12)
def painting_two_frames_a_latent():
    return lambda: painter(temporal_upsample=True)(torch.randn(2, 3, 5, 7, 8))


@run(adapter, "SpatialAttention", N=6, heads=4, H=5, W=7)
def attention():
    return lambda: painter().mid_attn(torch.randn(6, 24, 5, 7))


@run(train_adapter, N=6, H=24, W=20)
def losses():
    return lambda: train_adapter.ms_ssim(*torch.rand(2, 6, 24, 20, 3))


def folder() -> Path:
    return Path(tempfile.mkdtemp())


@run(encoders, "BaseAutoencoder", B=2, T=7, T_=7, N=14, H=24, W=20, h=6, w=5, C=48)
@run(encoders, "Patches", "unpatchify", N=14, H=24, W=20, h=6, w=5, p=4)
def pixels():
    encoder = encoders.create_autoencoder(encoders.EncoderConfig("pixels", patch_size=4))
    return lambda: encoder.decode(encoder.encode(torch.rand(2, 7, 24, 20, 3)))


@run(encoders, "read_stats", C=48, h=6, w=5)
def statistics():
    file = folder() / "stats.pt"

    def go():
        for std in (torch.ones(48), torch.ones(48, 6, 5)):
            torch.save({"std": std}, file)
            encoders.read_stats(file, 48)

    return go


@run(encoders, "main", C=768, h=16, w=16, T=1)
def picture():
    Image.new("RGB", (50, 80)).save(file := str(folder() / "photo.png"))
    words = ["encoders.py", "--image", file, "--output", file]
    return lambda: mock.patch.object(sys, "argv", words)(encoders.main)()


VIT = dict(heads=4, n=..., t=..., T=...)


@run(encoders, "Network", "Transformer", "DINO", **VIT, N=5, H=42, W=28, h=3, w=2, D=48, d=12)
def dino():
    test_encoders.dino(path := folder())
    network = encoders.build_network(encoders.RAE, str(path))
    return lambda: network.encode(torch.randn(5, 3, 42, 28))


@run(encoders, "Network", "VJEPA", "axial_rope", **VIT, N=5, H=32, W=48, h=2, w=3, D=128, pairs=32)
def vjepa():
    network = encoders.VJEPA(Path(), test_encoders.vjepa_state(), {})
    x = torch.randn(5, 3, 4, 32, 48)
    return lambda: (network(x), network.encode(x[:, :, 0]))


@run(encoders, "Transformer", "QwenTower", **VIT, N=..., H=56, W=84, h=4, w=6, D=32, d=8, frames=2)
def qwen():
    test_encoders.qwen(path := folder())
    network = encoders.build_network(encoders.QwenTower, str(path))
    return lambda: network.encode(torch.randn(6, 3, 56, 84))


@run(encoders, "ViTDecoder", N=3, h=4, w=6, C=48, side=5, p=4)
def vit_decoder():
    test_encoders.rae_decoder(path := folder())
    network = encoders.build_network(encoders.ViTDecoder, str(path))
    return lambda: network.decode(torch.randn(3, 4, 6, 48))


@run(encoders, "KLAutoencoder", N=2, H=24, W=32, h=6, w=8, C=4, D=64)
def kl_autoencoder():
    test_encoders.vavae(path := folder() / "vavae.pt")
    network = encoders.build_network(encoders.VAVAE, str(path))
    return lambda: network.decode(network.encode(torch.randn(2, 3, 24, 32)))


@run(encoders, "resize_grid", N=2, h=6, w=5, D=8)
def grid():
    return lambda: encoders.resize_grid(torch.randn(2, 6, 5, 8), (3, 4), "bilinear")


# ------------------------------------------------------------------------------------------------
# What is stated


class Claim(NamedTuple):
    """Shapes that a place in a file states of arguments, of assigned names or of a result."""

    place: str
    names: tuple[str, ...] | None  # None: the result; "": the first tensor among the arguments
    shapes: list[list[str]]  # one for all, or one for each; every one a list of alternatives


def read(text: str, place: str, known: set[str], arguments: list[str] | None) -> list[Claim]:
    """Read the claims of a docstring; of a module's (arguments None): the table of its names."""
    claims, end = [], 0
    for match in re.finditer(SHAPE, text.replace("'", "_")):
        if {*re.findall("[A-Za-z_]+", match[0])} - known - {"or"}:
            continue  # no shape
        between, end = text[end : match.start()], match.end()
        words = re.search(r"((?:\w+, )*\w+)? *$", between)[1] or ""
        names = tuple(name for name in words.split(", ") if name in (arguments or words))
        if claims and re.fullmatch(r" or [\w ]*", between):
            claims[-1].shapes[-1].append(match[0])
        elif claims and between == ", ":
            claims[-1].shapes.append([match[0]])
        elif arguments is None:
            claims += [Claim(place, names, [[match[0]]])] * between.endswith("  ")
        elif names and words:
            claims.append(Claim(place, names, [[match[0]]]))
        else:
            result = re.search(r"->|\bto\b", between.rpartition("\n")[2])
            claims.append(Claim(place, None if result else ("",), [[match[0]]]))
    return claims


class Function:
    """What is stated of a function's arguments and result, and behind its lines."""

    def __init__(self, node: ast.FunctionDef, name: str, about: str, key: list, known, source):
        self.name, self.lines, file = name, {}, source[0]
        self.arguments = [
            a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"
        ]
        self.claims = read(about, f"{file}:{node.lineno} {name}", known, self.arguments)
        told = {name for claim in self.claims for name in claim.names or ()}
        told |= {*self.arguments[:1]} if "" in told else set()
        silent = {*self.arguments} - told
        self.inherited = [
            Claim(c.place, (n,), c.shapes) for c in key for n in c.names if n in silent
        ]
        todo = list(node.body)
        while todo:  # its statements, not those of functions inside it
            part = todo.pop()
            if isinstance(part, (ast.Assign, ast.Return)):
                targets = getattr(part, "targets", ())
                names = tuple(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
                if comment := re.search(rf"#\s+({SHAPE})", source[part.end_lineno]):
                    shape, place = comment[1].replace("'", "_"), f"{file}:{part.end_lineno}"
                    claim = Claim(place, names if targets else None, [[shape]])
                    self.lines |= dict.fromkeys(range(part.lineno, part.end_lineno + 1), claim)
            elif not isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                todo += ast.iter_child_nodes(part)


@functools.cache
def documented(module: types.ModuleType) -> dict[tuple, Function]:
    """Find the functions of a module: {(file, first line, name): what is stated about them}."""
    text, functions = Path(module.__file__).read_text(), {}
    known = {name for one, _, _, letters, _ in RUNS if one is module for name in letters}
    tree, source = ast.parse(text), [Path(module.__file__).name, *text.splitlines()]
    key = read(ast.get_docstring(tree), source[0], known, None)

    def visit(node: ast.AST, outer: str, about: str) -> None:
        for part in ast.iter_child_nodes(node):
            if not isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                visit(part, outer, about)
                continue
            name, doc = f"{outer}{part.name}", ast.get_docstring(part) or ""
            if isinstance(part, ast.FunctionDef):
                doc += about if part.name == "forward" else ""  # the class tells of its forward
                line = min(n.lineno for n in (part, *part.decorator_list))
                function = Function(part, name, doc, key, known, source)
                functions[module.__file__, line, part.name] = function
            visit(part, f"{name}.", doc)

    visit(tree, "", "")
    return functions


# ------------------------------------------------------------------------------------------------
# What a run has, and whether it agrees


class Letters(dict):
    """The numbers of letters; that of `hw` is h * w."""

    def __getitem__(self, name: str) -> int:
        number = self.get(name)
        if number is ... or (number is None and len(name) == 1):
            raise KeyError(name)
        return number or math.prod(self[letter] for letter in name)


def fits(shape: str, size: tuple[int, ...], letters: Letters) -> bool:
    """Compare a shape with a size; a letter that is `...` becomes the number found."""
    shape = re.sub(r"(?<=\w) (?!or)(?=\w)(?<!or )|(?<=\d)(?=[A-Za-z])", "*", shape)  # p p 3, 2C
    dims = [dim.strip() for dim in shape[1:-1].split(",") if dim.strip()]
    if "..." in dims:
        i = dims.index("...")
        dims[i : i + 1] = ["-"] * (len(size) - len(dims) + 1)
    if len(dims) != len(size):
        return False
    for dim, number in zip(dims, size, strict=True):
        for expression in dim.rpartition("= ")[2].split(" or "):
            if letters.get(expression) is ...:
                letters[expression] = number
            try:
                if expression == "-" or eval(expression, {}, letters) == number:
                    break
            except NameError:  # an unknown letter
                return False
        else:
            return False
    return True


class Call(NamedTuple):
    """One call of a function: its letters, and the claims with what the run has."""

    letters: dict
    seen: list[tuple[Claim, list[str], tuple[int, ...]]]

    def faults(self, change: Callable[[Claim, str], str] = lambda claim, shape: shape) -> list[str]:
        """Give what is not true, all letters standing for one number throughout the call."""
        letters, faults = Letters(self.letters), []
        for claim, shapes, size in self.seen:
            shapes = [change(claim, shape) for shape in shapes]
            for shape in shapes + [re.sub(r"\[.*?\] ", "", shape) for shape in shapes]:
                trial = Letters(letters)
                if fits(re.sub("[][]", "", shape), size, trial):  # [T,]: with and without
                    letters = trial
                    break
            else:
                faults.append(f"{claim.place}: {' or '.join(shapes)} is {size}")
        return faults


def sizes(value) -> list[tuple[int, ...]]:
    """Give the sizes of a tensor, or of the tensors in a container."""
    if isinstance(value, (tuple, list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return [size for part in parts for size in sizes(part)]
    return [tuple(value.shape)] if isinstance(value, torch.Tensor) else []


def trace(module, parts: tuple[str, ...], results: bool, letters: dict, go: Callable) -> list[Call]:
    """Run and write down what every function has where something is stated about it."""
    functions, calls = documented(module), []

    def enter(frame, event, _):
        code = frame.f_code
        function = functions.get((code.co_filename, code.co_firstlineno, code.co_name))
        if function is None or (parts and function.name.split(".")[0] not in parts):
            return None
        seen, pending, given = [], None, dict(frame.f_locals)

        def see(claim: Claim, *values) -> None:
            found = [sizes(value) for value in values]
            found = found if len(found) > 1 else [[size] for size in found[0]]
            for i, group in enumerate(found):
                shapes = claim.shapes[i if len(claim.shapes) > 1 else 0]
                seen.extend((claim, shapes, size) for size in group)

        given[""] = next((given[n] for n in function.arguments if sizes(given[n])), None)
        for claim in (*function.claims, *function.inherited):
            if claim.names is not None:
                see(claim, *(given[name] for name in claim.names))

        def follow(frame, event, value):
            nonlocal pending
            here = frame.f_locals
            now = function.lines.get(frame.f_lineno) if event == "line" else None
            if pending and now is not pending:  # the line is done
                names = pending.names
                see(pending, *([value] if names is None else (here.get(name) for name in names)))
            pending = now
            if event == "return":
                for claim in function.claims if results else ():
                    if claim.names is None:
                        see(claim, value)
                own = {n: x for n, x in here.items() if type(x) is int}
                known = {n: x for n, x in letters.items() if x is not ... or n not in own}
                calls.append(Call(own | known, seen))
            return follow

        return follow

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        go()
    finally:
        sys.settrace(before)
    return calls


@functools.cache
def calls() -> list[Call]:
    with tempfile.TemporaryDirectory() as place, mock.patch.object(tempfile, "tempdir", place):
        with torch.no_grad():
            return [call for *options, prepare in RUNS for call in trace(*options, prepare())]


def test_documented_shapes_are_true():
    faults = {fault for call in calls() for fault in call.faults()}
    assert not faults, "\n".join(sorted(faults))


def test_every_documented_shape_is_run():
    stated, comments = set(), 0
    for module in MODULES:
        comments += len(re.findall(rf"\S  #\s+{SHAPE}", Path(module.__file__).read_text()))
        for function in documented(module).values():
            about = function.claims if module is not train_adapter else []  # some need whole runs
            stated |= {claim[:2] for claim in (*about, *function.lines.values())}
    assert not stated - {claim[:2] for call in calls() for claim, _, _ in call.seen}
    assert comments == sum(" " not in place for place, _ in stated) > 20


def spoil(shape: str, how: str) -> str:
    """Exchange the last two sizes of a shape, or drop the last."""
    *front, a, b = ["", *(dim.strip() for dim in shape[1:-1].split(","))]
    if a in ("", "...", b) or b in ("", "..."):
        return shape
    return f"({', '.join([*front, b, a] if how == 'exchange' else [*front, a])})"


def test_a_wrong_shape_is_found():
    tried, found = set(), set()
    for call in calls():
        for claim, shapes, _ in call.seen:
            for how in ("exchange", "drop"):
                if all(spoil(shape, how) != shape for shape in shapes):
                    tried.add((claim[:2], how))
                    if call.faults(lambda c, s, it=claim, how=how: spoil(s, how) if c is it else s):
                        found.add((claim[:2], how))
    assert not tried - found, "\n".join(map(str, tried - found))
    assert len(tried) > 100
