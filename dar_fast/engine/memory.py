"""Memory that is left on a device: what the driver, the kernel or the container says, the least."""

from pathlib import Path

import torch

# limit, use, the part of it that can be had back, by version of the kernel's control groups
GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device | str, root: Path = Path("/")) -> int:
    """Bytes that can be had on a device now.

    On a GPU what the driver calls free, and what torch holds and does not use. On a CPU
    MemAvailable, or what the process's control group leaves where that is less.

    Args:
        device: CPU or CUDA.
        root: where proc and sys are, for tests.

    Raises:
        OSError: where the system does not say.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    available = _counts(root / "proc/meminfo")["MemAvailable:"] * 1024
    return min([available, *_group_rooms(root)])


def _counts(path: Path) -> dict[str, int]:
    """The first two words of each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _group_rooms(root: Path) -> list[int]:
    """What each control group around this process leaves; a container sees its own as the root."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # no such kernel
    rooms = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", GROUPS[1]
        elif not controllers:
            top, names = root / "sys/fs/cgroup", GROUPS[0]
        else:
            continue
        folder = top / path.strip("/")
        for place in (folder, *folder.parents):
            rooms += _room(place, *names)
            if place == top:
                break
    return rooms


def _room(folder: Path, limit: str, use: str, reclaimable: str) -> list[int]:
    """Limit less use, where the group has both; caches of files give way."""
    try:
        most, used = (folder / limit).read_text(), (folder / use).read_text()
        cached = _counts(folder / "memory.stat").get(reclaimable, 0)
    except OSError:
        return []
    return [max(0, int(most) - int(used) + cached)] if most.strip() != "max" else []


__all__ = ["available_memory"]
