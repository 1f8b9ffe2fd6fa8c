"""The weights inside a DeepSpeed checkpoint, as stretches of bytes: nothing is gathered, converted or unpickled.

ZeRO 0 to 2 keep the whole model in `mp_rank_00_model_states.pt`. Under ZeRO 3 each rank's flat float32 groups in
`*_optim_states.pt` hold one parameter after another, of each a slice of ceil(n / ranks) elements, the last one padded
(as `deepspeed.utils.zero_to_fp32` puts them together).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.header import DTYPE_BITS
from mpruner_dist.checkpoints.stored import Piece, StoredTensor
from mpruner_dist.checkpoints.torch_files import named_tensors, read_torch_file
from mpruner_dist.errors import UserError

WHOLE = "mp_rank_00_model_states.pt"

OF_ONE_RANK = re.compile(r"((bf16_)?zero_pp_rank_\d+_)?" + re.escape(WHOLE))
"""Names of files where only ZeRO divided the model; those of experts end alike."""


def step_folder(path: Path) -> Path | None:
    """The folder with the files of the latest step, or None if `path` is no DeepSpeed checkpoint."""
    latest = path / "latest"
    if latest.is_file():
        name = latest.read_text().strip()
        if Path(name).name != name or not (path / name).is_dir():
            raise UserError(f"{latest} names {name!r}, which is no folder beside it: the checkpoint is not complete")
        return path / name
    return path if any(path.glob("*_model_states.pt")) else None


def zero_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All weights by name: in the model's dtype from ZeRO 0 to 2, in float32 from ZeRO 3.

    Raises:
        UserError: files are missing or damaged, or tensor or pipeline parallelism divided the model.
    """
    others = [path.name for path in folder.glob("*model_states.pt") if not OF_ONE_RANK.fullmatch(path.name)]
    if others:
        raise UserError(
            f"{folder} was divided by tensor, pipeline or expert parallelism ({sorted(others)[0]}): export it whole "
            "first"
        )
    if (folder / WHOLE).is_file():
        content = read_torch_file(folder / WHOLE)
        return _plain_names(named_tensors(folder / WHOLE, content.get("module") if isinstance(content, dict) else None))
    try:
        return _plain_names(_of_partitions(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} does not hold what DeepSpeed writes: {type(error).__name__}: {error}") from error


def frozen_names(folder: Path) -> list[str]:
    """Parameters without float32 weights and moments, for they are not trained."""
    if (folder / WHOLE).is_file():
        content = read_torch_file(folder / WHOLE)
        trained = {name for group in content.get("param_shapes") or () for name in group}
        other = trained | set(content.get("buffer_names") or ()) | set(content.get("shared_params") or ())
        return sorted(set(content.get("module") or ()) - other) if trained else []
    return list(read_torch_file(_by_rank(folder, "model_states")[0]).get("frozen_param_shapes") or ())


def require_every_rank(folder: Path) -> None:
    """Refuse a checkpoint of ZeRO 1 or 2 that lost a rank's part of the optimizer: DeepSpeed would not notice.

    Raises:
        UserError: files of ranks are missing.
    """
    if not (folder / WHOLE).is_file():
        return  # of ZeRO 3, which opening compares
    ranks, files = read_torch_file(folder / WHOLE).get("dp_world_size"), _by_rank(folder, "optim_states")
    if len(files) != ranks:
        raise UserError(
            f"{folder} was written by {ranks} ranks and has optimizer states of {len(files)}: fetch it again"
        )


def _of_partitions(folder: Path) -> dict[str, StoredTensor]:
    """ZeRO 3."""
    states = [read_torch_file(path) for path in _by_rank(folder, "model_states")]
    optimizers = _by_rank(folder, "optim_states")
    if len(optimizers) != len(states):
        raise UserError(f"{folder} has {len(states)} files of model states and {len(optimizers)} of the optimizer's")
    flats = [_Flat(path, _flat_groups(path)) for path in optimizers]
    tensors: dict[str, StoredTensor] = {}
    first = states[0]
    buffers = set(first.get("buffer_names") or ())
    tensors |= {n: t for n, t in (first.get("module") or {}).items() if n in buffers and isinstance(t, StoredTensor)}
    offset = 0
    for shapes in first["param_shapes"]:
        for name, shape in shapes.items():
            numel = math.prod(shape)
            share = -(-numel // len(flats))
            pieces: list[Piece] = []
            for rank, flat in enumerate(flats):
                pieces += flat.stretch(offset, max(0, min(share, numel - rank * share)))
            tensors[name] = StoredTensor("F32", tuple(shape), tuple(pieces))
            offset += share
    for flat in flats:
        if flat.length < offset:
            raise UserError(f"{flat.path} holds {flat.length} elements, the parameters need {offset}: it is damaged")
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        parts = [state["frozen_param_fragments"][name] for state in states]
        tensors[name] = _joined(name, tuple(shape), parts)
    return tensors


def _joined(name: str, shape: tuple[int, ...], parts: list[StoredTensor]) -> StoredTensor:
    """A frozen parameter from every rank's part, without the padding at the end."""
    left, pieces = math.prod(shape) * DTYPE_BITS[parts[0].dtype] // 8, []
    for part in parts:
        for piece in part.pieces:
            count = min(left, piece.end - piece.begin)
            pieces.append(Piece(piece.path, piece.begin, piece.begin + count))
            left -= count
    if left:
        raise UserError(f"the parts of the frozen parameter {name} do not fill its shape {list(shape)}")
    return StoredTensor(parts[0].dtype, shape, tuple(pieces))


@dataclass(frozen=True)
class _Flat:
    """The flat float32 groups of one rank, one after another."""

    path: Path
    groups: list[Piece]

    @property
    def length(self) -> int:
        return sum(piece.end - piece.begin for piece in self.groups) // 4

    def stretch(self, begin: int, count: int) -> list[Piece]:
        """Elements [begin, begin + count)."""
        pieces, start, position = [], 4 * begin, 0
        end = start + 4 * count
        for group in self.groups:
            size = group.end - group.begin
            low, high = max(start, position), min(end, position + size)
            if low < high:
                pieces.append(Piece(group.path, group.begin + low - position, group.begin + high - position))
            position += size
        return pieces


def _flat_groups(path: Path) -> list[Piece]:
    content = read_torch_file(path)
    state = content.get("optimizer_state_dict", {}) if isinstance(content, dict) else {}
    groups = state.get("fp32_flat_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(g, StoredTensor) and g.dtype == "F32" for g in groups):
        raise UserError(f"{path} holds no float32 groups of ZeRO stage 3")
    return [piece for group in groups for piece in group.pieces]


def _by_rank(folder: Path, kind: str) -> list[Path]:
    found = {}
    for path in folder.glob(f"*zero_pp_rank_*_mp_rank_00_{kind}.pt"):
        match = re.search(r"zero_pp_rank_(\d+)_", path.name)
        if match:
            found[int(match[1])] = path
    if sorted(found) != list(range(len(found))) or not found:
        raise UserError(
            f"{folder} lacks files of some ranks: zero_pp_rank_N_mp_rank_00_{kind}.pt for N in {sorted(found)}"
        )
    return [found[rank] for rank in sorted(found)]


def _plain_names(tensors: dict[str, Any]) -> dict[str, StoredTensor]:
    """Without the prefix that a wrapper around the model gave all names."""
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors
