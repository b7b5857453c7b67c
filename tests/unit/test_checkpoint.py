"""Checkpoints against disks that fill up, vanish or flip bits, and against folders made by somebody else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phi3_dist.errors import TrainingError
from phi3_dist.training.checkpoints.files import (
    Checkpoint,
    CheckpointPruner,
    find_checkpoint,
    read_state,
    verify,
    write_checkpoint,
)

FILES = ("state.safetensors", "trainer.json", "manifest.json")
TRAINER = {"identity": {"seed": 0}, "world_size": 1, "heldout_loss": None}


def state(number: float = 1.0) -> dict[str, Tensor]:
    return {"weight/a": torch.full((64, 8), number), "exp_avg/a": torch.ones(64, 8), "exp_avg_sq/a": torch.ones(64, 8)}


def saved(root: Path, *steps: int) -> Path:
    for step in steps:
        write_checkpoint(root, step, state(step), TRAINER)
    return root


def newest(root: Path) -> int | None:
    found, _ = find_checkpoint(root)
    return found.step if found else None


def test_round_trip(tmp_path: Path) -> None:
    found, passed = find_checkpoint(saved(tmp_path, 3, 12))
    assert found is not None
    assert (found.step, passed) == (12, [])
    assert found.trainer["identity"] == {"seed": 0}
    assert all(torch.equal(tensor, state(12)[name]) for name, tensor in read_state(found).items())


def test_a_step_that_is_made_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    write_checkpoint(tmp_path, 5, state(9.0), TRAINER)
    found, _ = find_checkpoint(tmp_path)
    assert found is not None
    assert read_state(found)["weight/a"][0, 0] == 9.0


def test_the_newest_and_the_best_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / "step_000006.tmp").mkdir()
    (tmp_path / "step_000007.tmp").mkdir()
    (tmp_path / "step_000007.tmp" / ".tmpx1Y2z3").write_text("left by a kill")
    CheckpointPruner().prune(tmp_path, 2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002", "step_000004", "step_000005"]


def damage(folder: Path) -> None:
    """One bit of the state, as a bad disk turns it."""
    raw = bytearray((folder / "state.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "state.safetensors").write_bytes(raw)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_damaged_ones_count_for_nothing_and_are_set_aside(tmp_path: Path) -> None:
    """With the newest two damaged, a run that went on from the third keeps it and what it saves itself."""
    root = saved(tmp_path, 3, 5, 8, 9)
    damage(root / "step_000008")
    (root / "step_000009" / "manifest.json").unlink()
    start, _ = find_checkpoint(root)
    assert start is not None
    kept = CheckpointPruner(start.folder)
    said = kept.prune(saved(root, 6), 2, None, 6)
    assert [line.split(":")[0] for line in said] == [
        "step_000009 is damaged and now called damaged-step_000009",
        "step_000008 is damaged and now called damaged-step_000008",
    ]
    assert names(root) == ["damaged-step_000008", "damaged-step_000009", "step_000005", "step_000006"]
    assert kept.prune(saved(root, 7, 8), 1, None, 8) == []
    assert newest(root) == 8
    assert names(root)[2:] == ["step_000005", "step_000008"]
    damage(root / "step_000008")
    kept.prune(saved(root, 9), 1, None, 9)
    assert "damaged-2-step_000008" in names(root)


def test_one_that_has_just_been_written_stays_beside_newer_names(tmp_path: Path) -> None:
    """Newer ones that could not be read for a while, and can be again: what this process writes is not thrown away."""
    root = saved(tmp_path, 3, 8, 9)
    CheckpointPruner(root / "step_000003").prune(saved(root, 4), 2, None, 4)
    assert names(root) == ["step_000003", "step_000004", "step_000008", "step_000009"]


def test_nothing_is_removed_for_one_that_does_not_verify(tmp_path: Path) -> None:
    root = saved(tmp_path, 1, 2, 3)
    damage(root / "step_000003")
    CheckpointPruner().prune(root, 1, None, 3)
    assert names(root) == ["damaged-step_000003", "step_000001", "step_000002"]


def test_one_that_changes_after_it_was_verified_is_verified_again(tmp_path: Path) -> None:
    kept, folder = CheckpointPruner(), saved(tmp_path, 1) / "step_000001"
    assert kept.verifies(folder)
    damage(folder)
    assert not kept.verifies(folder)


def test_only_files_of_checkpoints_are_removed(tmp_path: Path) -> None:
    root = saved(tmp_path, 1, 2, 3)
    (root / "step_notes.tmp").mkdir()
    (root / "step_000009.tmp").write_text("a file")
    (root / "step_000001" / "notes.txt").write_text("precious")
    (root / "step_000007.tmp").mkdir()
    (root / "step_000007.tmp" / "notes.txt").write_text("precious")
    CheckpointPruner().prune(root, 1, None, 3)
    assert (root / "step_notes.tmp").is_dir()
    assert (root / "step_000009.tmp").is_file()
    assert names(root / "step_000001") == names(root / "step_000007.tmp") == ["notes.txt"]
    assert names(root)[-2:] == ["step_000009.tmp", "step_notes.tmp"]
    assert newest(root) == 3


# --- bits and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_seen(name: str, tmp_path: Path) -> None:
    """Every byte of the small files and 200 of the large one, one bit each; the older checkpoint takes over."""
    file = saved(tmp_path, 1, 2) / "step_000002" / name
    raw = file.read_bytes()
    for place in range(0, len(raw), max(1, len(raw) // 200)):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        found, passed = find_checkpoint(tmp_path)
        assert found is not None
        if found.step == 2:  # what the manifest says besides sizes and hashes is not used
            assert name == "manifest.json"
            assert json.loads(damaged)["files"] == json.loads(raw)["files"]
            continue
        assert found.step == 1
        (line,) = passed
        assert line.startswith("passed over step_000002: ")
        assert len(line.splitlines()) == 1


@pytest.mark.parametrize("name", FILES)
def test_any_cut_is_seen(name: str, tmp_path: Path) -> None:
    file = saved(tmp_path, 1, 2) / "step_000002" / name
    raw = file.read_bytes()
    for length in range(0, len(raw) - (name == "manifest.json"), max(1, len(raw) // 200)):
        file.write_bytes(raw[:length])
        assert newest(tmp_path) == 1
    file.unlink()
    assert find_checkpoint(tmp_path)[1] == [f"passed over step_000002: {name} is missing"]


def test_appended_bytes_are_seen(tmp_path: Path) -> None:
    for name in ("state.safetensors", "trainer.json"):
        file = saved(tmp_path, 1, 2) / "step_000002" / name
        file.write_bytes(file.read_bytes() + b"\0")
        assert newest(tmp_path) == 1


def test_a_checkpoint_under_another_step_is_passed_over(tmp_path: Path) -> None:
    (saved(tmp_path, 7) / "step_000007").rename(tmp_path / "step_000009")
    assert find_checkpoint(tmp_path) == (None, ["passed over step_000009: it holds step 7"])


def test_a_state_that_goes_after_it_was_verified_is_told(tmp_path: Path) -> None:
    found, _ = find_checkpoint(saved(tmp_path, 1))
    assert found is not None
    (found.folder / "state.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert read_state(found) == {}
    (found.folder / "state.safetensors").write_bytes(b"short")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_state(found)


# --- folders that reach out of themselves ---------------------------------------------------------------------------


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = saved(tmp_path / "outside", 8) / "step_000008"
    root = saved(tmp_path / "root", 1)
    (root / "step_000008").symlink_to(outside)
    assert newest(root) == 1
    (root / "step_000008").unlink()
    (root / "step_000008").mkdir()
    for name in FILES:
        (root / "step_000008" / name).symlink_to(outside / name)
    assert newest(root) == 1
    assert sorted(p.name for p in outside.iterdir()) == sorted(FILES)


def test_pruning_a_linked_checkpoint_deletes_nothing_outside(tmp_path: Path) -> None:
    outside = saved(tmp_path / "outside", 1) / "step_000001"
    root = saved(tmp_path / "root", 5, 6)
    (root / "step_000001").symlink_to(outside)
    (root / "step_000003.tmp").symlink_to(outside)
    CheckpointPruner().prune(root, 1, None)
    assert sorted(p.name for p in outside.iterdir()) == sorted(FILES)
    assert newest(root) == 6


def test_a_save_does_not_write_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = saved(tmp_path / "root", 1)
    (root / "step_000002.tmp").symlink_to(outside)
    (root / "step_000002").symlink_to(outside)
    write_checkpoint(root, 2, state(), TRAINER)
    assert not any(outside.iterdir())
    assert newest(root) == 2


def test_a_manifest_names_no_file_of_its_own_choice(tmp_path: Path) -> None:
    """Only the two known names are read, whatever else a manifest lists."""
    folder = saved(tmp_path, 1) / "step_000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert isinstance(verify(folder), Checkpoint)
    del manifest["files"]["trainer.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder) == "KeyError: 'trainer.json'"


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '{"files": []}', '{"files": {"state.safetensors": 3}}', "\xff"]
)
def test_manifests_of_other_shapes_are_passed_over_in_one_line(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1) / "step_000001"
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    reason = verify(folder)
    assert isinstance(reason, str)
    assert reason
    assert "\n" not in reason


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder on which file systems can be mounted; whatever is mounted there goes at the end."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "mount"
    place.mkdir()
    yield place
    while subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True).returncode == 0:
        pass


def mount(place: Path, kib: int) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(place)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("this kernel lets no tmpfs be mounted")


def written(root: Path) -> bool:
    """Whether step 2 could be written; the only way not to is a full disk."""
    with contextlib.suppress(OSError):
        write_checkpoint(root, 2, state(2), TRAINER)
        return True
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(root, 2, state(2), TRAINER)
    return False


def test_a_disk_that_fills_up_at_any_byte_leaves_the_last_checkpoint(mounted: Path, tmp_path: Path) -> None:
    """From no room for the first file to room for all but the last page, in steps of a page."""
    example = saved(tmp_path / "example", 1) / "step_000001"
    pages = sum(-(-(example / name).stat().st_size // 4096) for name in FILES)
    assert pages >= 4
    outcomes = []
    for free in range(pages + 3):
        mount(mounted, (2 * pages + 4) * 4)
        root = saved(mounted / "checkpoints", 1)
        room = shutil.disk_usage(mounted).free
        (mounted / "filler").write_bytes(b"\0" * (room - free * 4096))
        outcomes.append(written(root))
        if not outcomes[-1]:
            assert sorted(p.name for p in root.iterdir()) == ["step_000001"]
        assert newest(root) == (2 if outcomes[-1] else 1)
        if not outcomes[-1]:
            (mounted / "filler").unlink()
            write_checkpoint(root, 2, state(2), TRAINER)  # the next interval, with room again
            assert newest(root) == 2
        subprocess.run(["umount", str(mounted)], check=True)
    assert outcomes == sorted(outcomes)
    assert not outcomes[0]
    assert outcomes[-1]


def test_a_read_only_disk_is_told_and_read_from(mounted: Path) -> None:
    mount(mounted, 512)
    root = saved(mounted / "checkpoints", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        write_checkpoint(root, 2, state(), TRAINER)
    assert newest(root) == 1


def test_a_mount_that_vanishes_is_told(mounted: Path) -> None:
    """What lies under it afterwards is an empty folder, which belongs to somebody: no run is begun there by itself."""
    mount(mounted, 512)
    (mounted / "run").mkdir()
    root = saved(mounted / "run" / "checkpoints", 1)
    subprocess.run(["umount", "-l", str(mounted)], check=True)
    with pytest.raises(OSError, match="No such file"):
        write_checkpoint(root, 2, state(), TRAINER)
    assert not any(mounted.iterdir())
