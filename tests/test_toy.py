"""The toy world: physics with known answers, exact repetition, and what the cameras must show."""

import copy
import re

import numpy as np
import pytest
from conftest import read_episode

from data import (
    COLOURS,
    EDGE,
    MAX_MOVE,
    POLICIES,
    WORKSPACE,
    DataConfig,
    EpisodeDataset,
    InputError,
    ToyConfig,
    ToyWorld,
    centroid,
    generate_toy,
    toy_episode,
    toy_policy,
    toy_state_at,
)

CLOSE, OPEN = 0, 1


def scene(blocks, gripper=(0.30, 0.0, 0.15), yaw=0.0, **options):
    """A world with blocks at given (x, y), turned straight, and nothing held."""
    world = ToyWorld(ToyConfig(blocks=len(blocks), **options), 0)
    for i, (x, y) in enumerate(blocks):
        world.block[i] = x, y, EDGE / 2, 0
    world.gripper, world.yaw = np.array(gripper, float), yaw
    return world


def drive(world, place, grip):
    """Fly straight to a place, moves within the policies' bounds."""
    while (miss := np.array(place) - world.gripper) @ miss > 1e-10:
        before = world.gripper.copy()
        world.step([*np.clip(miss, -MAX_MOVE, MAX_MOVE), 0, 0, 0, grip])
        if np.allclose(world.gripper, before):
            return


def fetch(world, i):
    """Grasp block i and lift it."""
    x, y, z, _ = world.block[i]
    drive(world, (x, y, 0.19), OPEN)
    drive(world, (x, y, z - 0.015), OPEN)
    world.step([0, 0, 0, 0, 0, 0, CLOSE])
    drive(world, (x, y, 0.18), CLOSE)


def psnr_of_copying(frames):
    error = np.diff(frames.astype(float) / 255, axis=0) ** 2
    return -10 * np.log10(error.mean((1, 2, 3)) + 1e-9)


def test_the_same_seed_gives_the_same_episode_and_another_seed_another():
    config = ToyConfig(steps=(6, 8), camera_jitter=0.02, table_variation=1.0, distractors=2)
    frames, _, metadata = toy_episode(config, (5, 0, 1))
    again, _, same = toy_episode(config, (5, 0, 1))
    assert metadata == same and np.array_equal(frames, again)
    assert metadata != toy_episode(config, (6, 0, 1))[2]


def test_a_copied_world_repeats_and_other_actions_lead_elsewhere():
    world = ToyWorld(ToyConfig(), 3)
    policy = toy_policy(world, "play", np.random.default_rng(0))
    for _ in range(12):
        world.step(next(policy))
    picture = world.render()

    def future(sign):
        other = copy.deepcopy(world)
        for _ in range(4):
            other.step([0.0, sign * 0.04, 0, 0, 0, sign * 0.1, CLOSE])
        return other.render()

    left, right = future(1), future(-1)
    assert np.array_equal(left, future(1)) and not np.array_equal(left, right)
    assert np.array_equal(world.render(), picture)


@pytest.mark.parametrize("kind", POLICIES)
def test_stored_metadata_rebuild_every_frame(kind):
    shares = [float(kind == name) for name in POLICIES]
    frames, _, metadata = toy_episode(ToyConfig(policies=shares, steps=(20, 30)), (0, 1, 2))
    for t in (0, 7, frames.shape[1] - 1):
        world = toy_state_at(metadata, t)
        assert np.array_equal(world.render(), frames[:, t])
    assert world.success == metadata["success"]


def test_the_arm_moves_exactly_as_told_inside_its_workspace_and_stops_at_its_limits():
    world = scene([(0.40, 0.15)])
    start = world.gripper.copy()
    world.step([0.03, -0.04, 0.02, 0, 0, 0.2, OPEN])
    assert np.allclose(world.gripper - start, [0.03, -0.04, 0.02], atol=1e-7)
    assert world.yaw == pytest.approx(0.2)
    for _ in range(20):
        world.step([-0.05, -0.05, 0.05, 0, 0, 0.25, OPEN])
    low, high = WORKSPACE
    assert np.allclose(world.gripper, [low[0], low[1], high[2]])


def test_a_closed_gripper_pushes_a_block_ahead_and_leaves_the_others():
    world = scene([(0.30, 0.0), (0.40, 0.15)])
    drive(world, (0.30, -0.10, 0.02), CLOSE)
    before = world.block.copy()
    drive(world, (0.30, 0.03, 0.02), CLOSE)
    moved = world.block - before
    assert moved[0, 1] > 0.04 and abs(moved[0, 0]) < 0.005
    assert np.all(moved[1] == 0) and moved[0, 2] == 0
    assert world.block[0, 1] - world.half[0] >= world.gripper[1]  # no finger inside the block


def test_a_pushed_block_pushes_the_next():
    world = scene([(0.30, 0.0), (0.30, 0.06)])
    drive(world, (0.30, -0.10, 0.02), CLOSE)
    drive(world, (0.30, 0.02, 0.02), CLOSE)
    gap = world.block[1, 1] - world.block[0, 1] - 2 * world.half[0]
    assert world.block[1, 1] > 0.08 and -1e-3 < gap < 0.01


def test_a_grasped_block_follows_the_gripper_and_falls_when_released():
    world = scene([(0.30, 0.0), (0.40, 0.15)])
    fetch(world, 0)
    assert world.held == 0 and world.block[0, 2] > 0.15
    offset = world.block[0, :3] - world.gripper
    drive(world, (0.24, -0.12, 0.17), CLOSE)
    assert np.allclose(world.block[0, :3] - world.gripper, offset, atol=1e-9)
    world.step([0, 0, 0, 0, 0, 0.2, CLOSE])
    assert world.block[0, 3] == pytest.approx(world.yaw)
    world.step([0, 0, 0, 0, 0, 0, OPEN])
    assert world.held == -1 and world.block[0, 2] == pytest.approx(world.half[0])
    assert np.allclose(world.block[0, :2], (0.24, -0.12), atol=0.01)


def test_an_empty_grasp_holds_nothing():
    world = scene([(0.30, 0.0)])
    drive(world, (0.30, 0.10, 0.02), OPEN)
    world.step([0, 0, 0, 0, 0, 0, CLOSE])
    assert world.held == -1


def test_the_goal_on_the_plate_succeeds_only_when_released_there():
    world = scene([(0.30, 0.10), (0.40, 0.15)], stack_share=0.0)
    world.plate[:2] = 0.30, -0.10
    fetch(world, 0)
    drive(world, (0.30, -0.10, 0.05), CLOSE)
    assert not world.success
    drive(world, (0.30, -0.10, 0.015), CLOSE)
    world.step([0, 0, 0, 0, 0, 0, OPEN])
    assert world.success
    fetch(world, 0)
    assert not world.success


def test_the_other_block_on_the_plate_is_no_success():
    world = scene([(0.30, 0.10), (0.30, -0.10)], stack_share=0.0)
    world.plate[:2] = 0.30, -0.10
    assert not world.success


def test_a_block_stacks_rides_along_and_topples():
    world = scene([(0.30, 0.10), (0.30, -0.05)], stack_share=1.0)
    fetch(world, 0)
    drive(world, (0.30, -0.05, 0.16), CLOSE)
    world.step([0, 0, 0, 0, 0, 0, OPEN])
    assert world.success and world.block[0, 2] == pytest.approx(1.5 * EDGE)
    drive(world, (0.30, -0.05, 0.19), OPEN)
    drive(world, (0.30, -0.16, 0.15), CLOSE)
    drive(world, (0.30, -0.16, 0.045), CLOSE)  # the palm stays above the upper block
    below = world.block[1, 1]
    for _ in range(4):
        world.step([0, 0.02, 0, 0, 0, 0, CLOSE])
    assert world.block[1, 1] > below + 0.005 and world.success  # the upper block rode along
    world.block[0, :2] = world.block[1, :2] + [0.9 * EDGE, 0]
    world.step([0, 0, 0, 0, 0, 0, CLOSE])
    assert world.block[0, 2] == pytest.approx(EDGE / 2) and not world.success


def test_the_arm_stops_on_top_of_a_block():
    world = scene([(0.30, 0.0)])
    drive(world, (0.30, 0.0, 0.15), CLOSE)
    drive(world, (0.30, 0.0, 0.02), CLOSE)
    assert world.gripper[2] == pytest.approx(EDGE, abs=1e-6)
    assert np.allclose(world.block[0, :2], (0.30, 0.0))


@pytest.mark.parametrize("kind", POLICIES)
def test_policies_stay_in_bounds_and_blocks_stay_solid(kind):
    for seed in range(4):
        world = ToyWorld(ToyConfig(distractors=seed % 2), seed)
        policy = toy_policy(world, kind, np.random.default_rng(seed))
        for _ in range(30):
            action, before = next(policy), world.gripper.copy()
            assert action.dtype == np.float32 and action.shape == (7,)
            assert np.abs(action[:3]).max() <= MAX_MOVE + 1e-6
            assert action[6] in (0, 1) and not action[3:6].any()
            target = before + action[:3]
            assert (target >= WORKSPACE[0] - 1e-5).all() and (target <= WORKSPACE[1] + 1e-5).all()
            world.step(action)
            assert (world.block[:, 2] >= world.half - 1e-9).all()  # none through the table
            assert np.isfinite(world.block).all() and world.gripper[2] >= WORKSPACE[0, 2] - 1e-9


def test_the_expert_succeeds_and_near_misses_fail():
    def share(kind):
        shares = [float(kind == name) for name in POLICIES]
        results = []
        for seed in range(12):
            world = ToyWorld(ToyConfig(policies=shares), seed)
            policy = toy_policy(world, kind, np.random.default_rng(seed))
            for _ in range(30):
                world.step(next(policy))
            results.append(world.success)
        return np.mean(results)

    assert share("expert") >= 0.9 and share("near_miss") <= 0.1


@pytest.mark.parametrize("view", range(3))
def test_the_background_stands_still_where_nothing_is(view):
    """Pixels that neither the arm nor a shadow reaches are equal in all frames."""
    world = scene([(0.30, 0.0)], size=64)
    frames = []
    for y in (-0.04, 0.04, 0.04, -0.04):
        world.step([0.0, y, 0, 0, 0, 0, OPEN])
        frames.append(world.render(views=(view,))[0])
    still = (np.ptp(np.stack(frames).astype(int), axis=0) == 0).all(-1)
    assert still.mean() > 0.5 and np.array_equal(frames[0], frames[2]) is False
    assert np.array_equal(frames[1], frames[3])  # the same place gives the same picture


@pytest.mark.parametrize("axis", range(3))
def test_opposite_actions_move_the_marker_to_opposite_sides_as_the_simulator_says(axis):
    world = ToyWorld(ToyConfig(), 0)
    for trial in range(10):
        rng = np.random.default_rng(trial)
        world.gripper = rng.uniform(WORKSPACE[0] + 0.06, WORKSPACE[1] - [0.06, 0.06, 0.05])
        seen, true = [], []
        for sign in (1, -1):
            other = copy.deepcopy(world)
            other.step(0.045 * sign * np.eye(7)[axis] + [0, 0, 0, 0, 0, 0, OPEN])
            seen.append(centroid(other.render(views=(0,))[0], "cyan"))
            true.append(other.project(other.positions()["marker"]))
        moved, expected = seen[0] - seen[1], true[0] - true[1]
        cosine = moved @ expected / np.linalg.norm(moved) / np.linalg.norm(expected)
        assert np.linalg.norm(moved) > 4 and cosine > 0.95


@pytest.mark.parametrize("size", (64, 128))
def test_every_camera_shows_the_marker_where_it_is_told(size):
    world = ToyWorld(ToyConfig(size=size), 0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        world.gripper, world.yaw = rng.uniform(*WORKSPACE), rng.uniform(-1.5, 1.5)
        found = centroid(world.render(), "cyan")
        told = np.stack([world.project(world.positions()["marker"], v) for v in range(3)])
        assert np.isfinite(found).all()
        error = np.linalg.norm(found - told, axis=-1) / size
        assert error[0] < 0.04 and error.max() < 0.10, (world.gripper, error)


def test_blocks_are_located_where_they_are_and_absent_colours_are_not():
    world = scene([(0.36, -0.12), (0.40, 0.02), (0.36, 0.14)], gripper=(0.20, 0.0, 0.19))
    frames = world.render(64)
    for name, place in world.positions().items():
        if name in world.names:
            for view in range(3):
                error = centroid(frames, name)[view] - world.project(place, view, 64)
                assert np.linalg.norm(error) < 1.5
    for colour in COLOURS.keys() - set(world.names) - {"cyan"}:
        assert np.isnan(centroid(frames, colour)).all()
    floats = centroid(frames.astype(np.float32) / 255, "cyan")
    assert floats.shape == (3, 2) and np.allclose(floats, centroid(frames, "cyan"), atol=1e-3)


def test_a_drawn_block_hides_what_is_behind_it():
    """The nearer of two blocks covers the farther; the gripper covers the block it stands on."""
    world = scene([(0.40, -0.06), (0.36, -0.042)], gripper=(0.2, 0.16, 0.19))
    eye = world.cameras[0][0]
    near, far = sorted((0, 1), key=lambda i: np.linalg.norm(world.block[i, :3] - eye))
    column, row = world.project(world.block[near, :3], 0, 256).astype(int)
    rgb = world.render(256, (0,))[0, row, column].astype(float)
    wanted = [np.array(COLOURS[world.names[i]], float) for i in (near, far)]
    angle = [rgb @ w / np.linalg.norm(rgb) / np.linalg.norm(w) for w in wanted]
    assert angle[0] > 0.99 > angle[1]


def test_frames_change_enough_to_make_copying_poor():
    values = np.concatenate(
        [psnr_of_copying(toy_episode(ToyConfig(), (0, 0, i))[0][0]) for i in range(6)]
    )
    assert 18 < np.median(values) < 23


def test_switches_change_what_they_say():
    def pictures(**options):
        return np.stack([ToyWorld(ToyConfig(**options), seed).render() for seed in range(3)])

    base = pictures()
    for options in ({"camera_shift": 10.0}, {"camera_jitter": 0.02}, {"table_variation": 1.0}):
        assert not np.array_equal(pictures(**options), base)
    world = ToyWorld(ToyConfig(palette=("yellow", "purple", "pink"), distractors=2), 0)
    assert sorted(world.names[:3]) == ["pink", "purple", "yellow"] and len(world.block) == 5
    assert "stack" in ToyWorld(ToyConfig(stack_share=1.0), 0).goal


@pytest.mark.parametrize(
    "options",
    (
        {"palette": ("cyan", "red", "green")},
        {"palette": ("red", "mauve", "green")},
        {"blocks": 4},
        {"steps": (1, 5)},
        {"policies": (1.0,)},
        {"distractors": -1},
    ),
)
def test_impossible_worlds_are_refused(options):
    with pytest.raises(ValueError):
        ToyConfig(**options)


def test_a_set_is_written_once_exactly_and_never_mixed(tmp_path):
    config = ToyConfig(episodes=3, test_episodes=2, steps=(4, 6))
    partial = tmp_path / ".toy.partial" / "train"
    partial.mkdir(parents=True)
    (partial / "000000007.safetensors").write_bytes(b"left by a killed run")
    folder = generate_toy(tmp_path, config)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert len([f for f in files if f.suffix == ".safetensors"]) == 5
    assert not (tmp_path / ".toy.partial").exists()

    def contents():
        return {f: ((folder / f).stat().st_mtime_ns, (folder / f).read_bytes()) for f in files}

    before = contents()
    assert generate_toy(tmp_path, config) == folder and contents() == before
    again = generate_toy(tmp_path / "again", config)
    assert all((again / f).read_bytes() == content for f, (_, content) in before.items())
    with pytest.raises(InputError, match="remove it"):
        generate_toy(tmp_path, ToyConfig(episodes=4, test_episodes=2, steps=(4, 6)))


def test_stored_episodes_hold_the_executed_actions_in_model_units_and_rebuild_their_frames(
    tmp_path,
):
    config = ToyConfig(episodes=2, test_episodes=1, steps=(8, 8))
    folder = generate_toy(tmp_path, config)
    frames, actions, metadata = read_episode(folder / "train" / "000000001.safetensors")
    raw = np.array(metadata["toy"]["actions"])
    assert frames.shape == (3, 8, 64, 64, 3) and metadata["fps"] == 5
    assert np.allclose(actions[:, :3] * 0.05 / 1.75, raw[:, :3], atol=1e-6)  # none was clipped
    assert np.allclose(actions[:, 3:6] * 0.25 / 1.4, raw[:, 3:6], atol=1e-6)
    assert np.array_equal(actions[:, 6], 1 - 2 * raw[:, 6])  # -1 open, +1 closed
    for t in (0, 5):
        error = frames[:, t].astype(float) - toy_state_at(metadata, t).render()
        assert np.sqrt((error**2).mean()) < 8  # JPEG


def test_episodes_of_another_version_are_refused(tmp_path):
    generate_toy(tmp_path, ToyConfig(episodes=2, test_episodes=1, steps=(12, 12)))
    index = tmp_path / "toy/index.jsonl"
    index.write_text(re.sub(r'"version": \d+', '"version": 1', index.read_text()))
    with pytest.raises(InputError, match="toy episodes of another version"):
        EpisodeDataset(DataConfig(str(tmp_path), "toy", image_size=64), "train")
