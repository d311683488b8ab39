"""An opened checkpoint: what its metadata and its manifest say it holds, and where.

Enters: decoded Metadata and manifest. Leaves: names, locations and the saved tree. Invariant: whoever has
Contents has its reader too, and closes both.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from .._concurrency import collection_paused
from ..errors import CorruptCheckpointError, LoadError
from ..formats import (
    HeaderError,
    InnerValue,
    ItemKey,
    Manifest,
    Quantised,
    Tree,
    UnsupportedError,
    attached_digest,
    leaf_names,
    quantised_among,
    renamed_paths,
    renamed_tree,
    stored_chunks,
    tree_from_json,
    tree_from_paths,
    usable_paths,
)
from ..info import CheckpointInfo
from ..storage import Reader, turn_to_copy

_MAX_ATTACHED_BYTES = 1 << 30
"""More than any release attaches."""


@dataclass(slots=True, kw_only=True)
class Contents:
    """An opened checkpoint. Owns its reader; ``close()`` releases it."""

    info: CheckpointInfo
    reader: Reader
    metadata: Metadata
    digest: str
    """Checksum of the bytes of `.metadata`: tells whether two ranks see one state of the checkpoint."""
    manifest: Manifest | None
    """None if stock wrote it."""
    locations: Mapping[ItemKey, tuple[str, int, int]]
    """Item -> (file, offset, length)."""
    transforms: Mapping[ItemKey, tuple[str, ...]]
    """Item -> descriptors of torch's stream extensions that wrote it; most have none."""
    exotic: frozenset[str]
    """Tensors that were stored by ``torch.save``; stock's, where there is no manifest, are not told apart."""
    strides: Mapping[str, tuple[int, ...]]
    """Strides of tensors that were not row-major; of stock's none are known."""
    digests: Mapping[str, array[int]]
    """Checksums of the blocks of each file that has any."""
    image_bytes: Mapping[str, int]
    """Length of each file without its footer."""
    bare: frozenset[str] = frozenset()
    """Files whose items are the bytes of tensors and nothing else."""
    open_ended: frozenset[str] = frozenset()
    """Tensors in parts of which nobody recorded how many there are."""
    config: bytes | None = None
    """A model's config.json, where its tensors may be quantised."""
    quantised: Mapping[str, Quantised] = field(default_factory=dict)
    """Tensors whose values are made of what ``stored`` tells, by their names here."""
    stored: Contents | None = None
    """What lies in the files, under its own names, where some of it is quantised."""
    tree: Tree = None
    """What was saved, where no manifest tells it and yet somebody knows."""
    unfolded: Mapping[str, Mapping[str, InnerValue]] = field(default_factory=dict)
    """Leaf -> name -> what lay inside of it, for a state that has a container there."""
    # no argument, so that replace() makes contents whose tree is looked for anew
    _tree: Tree = field(default=None, init=False, repr=False)
    """What ``structure`` has decoded, if it was asked: nothing may change it."""
    _tensors: dict[str, TensorStorageMetadata] | None = field(default=None, init=False, repr=False)

    @property
    def names(self) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
        """Every name that was saved, in the order in which it was; those inside of an unfolded leaf in place
        of it."""
        if not self.unfolded:
            return self.metadata.state_dict_metadata
        names: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, meta in self.metadata.state_dict_metadata.items():
            if name in self.unfolded:
                names |= {inner: leaf.meta for inner, leaf in self.unfolded[name].items()}
            else:
                names[name] = meta
        return names

    @property
    def tensors(self) -> Mapping[str, TensorStorageMetadata]:
        """Those of ``names`` that are tensors."""
        if (
            self._tensors is None
        ):  # once: whoever reads a checkpoint in many small parts asks for each of them
            self._tensors = {
                name: meta for name, meta in self.names.items() if isinstance(meta, TensorStorageMetadata)
            }
        return self._tensors

    def unfolded_leaf(self, name: str) -> InnerValue | None:
        """What lay inside of a leaf under ``name``."""
        # asked for each tensor of a load, and mostly empty: only leaves of stock's are taken apart
        for leaves in self.unfolded.values():
            if name in leaves:
                return leaves[name]
        return None

    @property
    def structure(self) -> Tree:
        """The tree that was saved; of stock's checkpoints, as far as ``planner_data`` tells (its keys are all
        str, and nothing tells the strides that a tensor had: they come back row-major, as stock gives
        them)."""
        if self._tree is not None:  # asked for at least twice by each load of Statefuls
            return self._tree
        if self.tree is not None and not self.unfolded:
            return self.tree
        if self.manifest is not None:
            try:
                with collection_paused():  # that of many tensors is as many objects
                    tree = tree_from_json(self.manifest.structure)
                    # whoever walks the tree looks its names up in `.metadata`
                    if set(leaf_names(tree)) != self.names.keys():
                        raise ValueError("its leaves are not the names in .metadata")
                self._tree = tree
                return tree
            except ValueError as error:
                name = self.info.checkpoint_id
                raise CorruptCheckpointError(
                    f"checkpoint {name!r}: its manifest has a tree that makes no sense: {error}",
                    checkpoint_id=name,
                ) from error
        inside = {name: leaf.path for leaves in self.unfolded.values() for name, leaf in leaves.items()}
        return tree_from_paths({**usable_paths(self.metadata), **inside}, list(self.names))

    def dequantized(self, dtype: torch.dtype | None) -> Contents:
        """It with all that is quantised in blocks as plain tensors of ``dtype``, their scales left out; the
        reader is the same one. None: as it is stored.

        Raises: CorruptCheckpointError; LoadError for what is quantised in another way, and for checkpoints.
        """
        if dtype is None:
            return self
        name = self.info.checkpoint_id
        if not self.bare or self.manifest is not None:
            raise LoadError(
                f"checkpoint {name!r}: dequantize= is for safetensors files that others wrote, and this is a "
                "checkpoint of DCP's; leave it out; nothing was loaded",
                checkpoint_id=name,
            )
        try:
            quantised = quantised_among(self.tensors, self.config, dtype)
        except UnsupportedError as error:
            raise LoadError(
                f"checkpoint {name!r}: {error}; nothing was loaded", checkpoint_id=name
            ) from error
        except HeaderError as error:
            raise CorruptCheckpointError(
                f"checkpoint {name!r}: {error}; nothing was loaded", checkpoint_id=name
            ) from error
        # a plain model has no place for them: left in, each would be unexpected
        scales = {plain.scales for plain in quantised.values()}
        known = {
            key: quantised[key].meta if key in quantised else meta
            for key, meta in self.metadata.state_dict_metadata.items()
            if key not in scales
        }
        # where numbers lie stands for where values do: whoever orders names by it reads files in order
        locations = {key: place for key, place in self.locations.items() if key[0] not in scales}
        for plain_name, plain in quantised.items():
            for offsets, stored in stored_chunks(plain, self.tensors[plain.weight]):
                locations[plain_name, offsets] = self.locations[plain.weight, stored]
        metadata = replace(self.metadata, state_dict_metadata=known)
        return replace(self, metadata=metadata, locations=locations, quantised=quantised, stored=self)

    def renamed(self, names: Mapping[str, str], rename: Callable[[str], str | None]) -> Contents:
        """The part of it that ``names`` (old -> new) tells, under the new names; the reader is the same one.

        Args:
            rename: the new name of an empty container, which is none of ``names``; None leaves it out.
        Raises: ValueError if two of the new names can't be in one tree.
        """
        known = self.metadata.state_dict_metadata
        made = replace(
            self,
            tree=None,
            metadata=replace(
                self.metadata,
                state_dict_metadata={new: known[name] for name, new in names.items()},
                planner_data=renamed_paths(usable_paths(self.metadata), names),
            ),
            locations={
                (names[name], offsets): location
                for (name, offsets), location in self.locations.items()
                if name in names
            },
            transforms={
                (names[name], offsets): descriptors
                for (name, offsets), descriptors in self.transforms.items()
                if name in names
            },
            exotic=frozenset(names[name] for name in self.exotic if name in names),
            quantised={names[name]: plain for name, plain in self.quantised.items() if name in names},
            open_ended=frozenset(names[name] for name in self.open_ended if name in names),
            strides={names[name]: strides for name, strides in self.strides.items() if name in names},
        )
        # of stock's the paths above are all there is
        if self.manifest is not None or self.tree is not None:
            made._tree = renamed_tree(
                self.structure, lambda name: names.get(name) if name in known else rename(name)
            )
        return made

    async def attached(self, name: str) -> bytes:
        """The bytes of a file that was attached. Raises: LoadError for a name that was not;
        CorruptCheckpointError; StorageError."""
        checkpoint_id = self.info.checkpoint_id
        files = self.manifest.attached_files if self.manifest is not None else {}
        file = next((file for file, entry in files.items() if entry.name == name), None)
        if file is None:
            raise LoadError(
                f"checkpoint {checkpoint_id!r} has no file {name!r}; attached to it: "
                f"{', '.join(map(repr, self.info.files)) or 'none'}",
                checkpoint_id=checkpoint_id,
            )
        entry = files[file]
        # it was found to be so long when it was opened, but one of holes is as long as anybody likes
        content = bytearray(entry.nbytes if entry.nbytes <= _MAX_ATTACHED_BYTES else 0)
        await self.reader.read_into(file, [(0, memoryview(content))])
        if attached_digest(content) != entry.digest:
            raise CorruptCheckpointError(
                f"checkpoint {checkpoint_id!r}: {file}, which holds {name!r}, does not match its checksum; "
                "load an older checkpoint",
                checkpoint_id=checkpoint_id,
            )
        return bytes(content)

    @property
    def is_merged(self) -> bool:
        """Whether each rank wrote metadata of its own, so that nothing says how many there were."""
        return self.manifest is None and self.info.world_size is not None

    async def turn_to_copy(self, file: str, why: str) -> bool:
        """``file`` was found damaged: from here on it is read from another tier. False if none has it."""
        return await turn_to_copy(self.reader, file, why)

    async def close(self) -> None:
        await self.reader.close()
