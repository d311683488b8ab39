"""TreeMatcher: what is taken as it was saved, whole subtrees of it, because no name says whose it is.

Enters: a state's Statefuls and the tree that was saved. Leaves: entries of a Match, and the names of the
state that are settled by them. Pure: no I/O, and nothing of the state is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..catalog import Contents
from ..formats import Tree, children_of, cut, grafted, kind_of, leaf_names, like, locate, subtree, text_of
from ..state import UNASKED, OptimizerState, PerRank, RNGState, Targets, Whole
from .entry_shapes import misfit
from .subtrees import Subtrees
from .tensor_matching import TensorMatcher


class TreeMatcher:
    """Settles what PerRank, Statefuls, optimizers' options and their entries take."""

    def __init__(self, targets: Targets, contents: Contents, tensors: TensorMatcher) -> None:
        self._targets = targets
        self._contents = contents
        self._names = contents.names
        self._structure = contents.structure
        self._tensors = tensors
        self._match = tensors.match
        self._subtrees = Subtrees(targets.flat, targets.tensors.keys() | targets.leaves)
        self.settled: set[str] = set()
        """Names of the state that are taken care of, whatever the checkpoint has under them."""
        self.misfits: list[tuple[str, str]] = []
        """Entries of parameters that have another size now, and why: said after what became of those."""
        self.surplus: set[str] = set()
        """What is taken although the state has no place of that number."""

    def run(self) -> None:
        """Settle all of them, those of ranks first: what lies inside of such a one goes with it."""
        targets = self._targets
        self._match_per_rank()
        for prefix, whole in targets.wholes.items():
            if prefix not in self.settled:
                self._match_whole(prefix, whole)
        for prefix, groups in targets.named_groups.items():
            if prefix not in self.settled:
                self._match_named_groups(prefix, groups)
        for prefix, mapping in targets.optimizer_states.items():
            self._match_optimizer_state(prefix, mapping)
        for prefix, accepts in targets.grows.items():
            self._match_grown(prefix, accepts)

    def _match_per_rank(self) -> None:
        """What is PerRank and was saved by another number of ranks is taken from all of them."""
        match, targets = self._match, self._targets
        for prefix in targets.flat.own:
            self._match_own(prefix)
        for prefix, value in targets.flat.per_rank.items():
            exists, node = locate(self._structure, prefix)
            if isinstance(value.value, RNGState) and (value.on_resize is None or not _is_per_rank(node)):
                self._match_own(prefix)
                continue
            saved = len(children_of(node)) if exists else 0
            if saved in (0, targets.world_size):
                continue
            self.settled.update(self._subtrees.at_or_below(prefix))
            # whole subtrees inside go with it, whatever rank they were saved by
            self.settled.update(self._subtrees.objects_in(prefix, (*targets.wholes, *targets.named_groups)))
            if value.on_resize is None:
                match.mismatch(
                    prefix,
                    f"was saved by {saved} ranks, one for each, and there are {targets.world_size} now; "
                    "PerRank(..., on_resize=...) says what each takes",
                )
            else:
                match.resized.add(prefix)
                match.nodes[prefix] = node
                self._tensors.take(leaf_names(node, prefix))

    def _match_own(self, prefix: str) -> None:
        """What is each rank's own by itself: one that was saved once, for all, is everybody's, and a rank
        that had no counterpart keeps what it has."""
        match, rank = self._match, self._targets.flat.rank
        exists, node = locate(self._structure, prefix)
        keys = [str(key) for key, _ in children_of(node)] if exists else []
        if not keys or PerRank.key(rank) in keys:
            return
        match.resized.add(prefix)
        self.settled.update(self._subtrees.at_or_below(prefix))
        self.settled.add(f"{prefix}.{PerRank.key(rank)}")
        if not _is_per_rank(node):
            match.nodes[prefix] = node
            self._tensors.take(leaf_names(node, prefix))

    def _match_whole(self, prefix: str, whole: Whole) -> None:
        """Take all that was saved there; where nothing was, a Stateful is missing."""
        match, targets = self._match, self._targets
        exists, node = locate(self._structure, prefix)
        # objects inside of it take their own
        objects = self._subtrees.objects_in(prefix, targets.statefuls)
        theirs = {name for head in objects for name in self._subtrees.at_or_below(head)}
        mine = [name for name in self._subtrees.at_or_below(prefix) if name not in theirs]
        if not exists:
            self._match_unsaved(prefix, whole, mine)
            return
        node = cut(node, objects, prefix)
        # stock does not tell kinds of mappings and of keys: what is present does
        if self._contents.manifest is None and whole.present is not UNASKED:
            node = like(node, whole.present)
        match.nodes[prefix] = node
        match.objects[prefix] = objects
        saved = [name for name in leaf_names(node, prefix) if name not in objects]
        self.settled.update(mine)
        for name in saved:
            self._take_or_fill(name)
        if whole.keeps:
            match.kept += sorted(set(mine).difference(saved))
        if lacking := sorted(targets.strict.intersection(mine).difference(saved)):
            match.missing += lacking
            match.nodes[prefix] = grafted(node, whole.present, set(lacking), prefix)

    def _match_unsaved(self, prefix: str, whole: Whole, mine: Sequence[str]) -> None:
        if whole.is_stateful:
            self._match.absent.add(prefix)
            self.settled.update(mine)
            if mine or whole.present is UNASKED:  # else it has no state, and had none
                self._match.missing.append(prefix)
        elif whole.keeps and not isinstance(whole.present, Mapping):
            self._match.kept += mine
            self.settled.update(mine)

    def _take_or_fill(self, name: str) -> None:
        """Have ``name`` read into memory that its owner showed, where that is of use; else into ours."""
        tensor = self._targets.tensors.get(name)
        if tensor is None:
            self._tensors.take([name])
        elif name in self._targets.strict:
            self._tensors.match_tensor(name, tensor)
        elif self._tensors.can_hold(name, tensor):
            self._match.offered.add(name)
            self._tensors.match_tensor(name, tensor)
        else:
            self._tensors.take([name])

    def _match_named_groups(self, prefix: str, groups: list[Any]) -> None:
        """Take all groups as they were saved. A group finds its own when all is read, so nothing is read into
        the one that happens to have its number; another number of them is a misfit."""
        match = self._match
        _, node = locate(self._structure, prefix)
        if self._contents.manifest is None:
            node = like(node, groups)
        # nothing that groups could be taken from: their names are compared one by one
        if kind_of(node) != "list":
            return
        num_saved = len(children_of(node))
        mine = self._subtrees.at_or_below(prefix)
        saved = leaf_names(node, prefix)
        beyond = tuple(f"{prefix}.{number}." for number in range(num_saved, len(groups)))
        match.missing += [name for name in mine if name.startswith(beyond)]
        self.settled.update(mine)
        beyond = tuple(f"{prefix}.{number}." for number in range(len(groups), num_saved))
        self.surplus.update(name for name in saved if name.startswith(beyond))
        match.nodes[prefix] = node
        self._tensors.take(saved)

    def _match_optimizer_state(self, prefix: str, mapping: OptimizerState) -> None:
        """An optimizer's state grows with its history: what does not have the saved form gives way to it."""
        match = self._match
        node = subtree(self._structure, prefix)
        kind = kind_of(node)
        if kind is None or kind == "list":
            return
        heads = {f"{prefix}.{key}": (key, child) for key, child in children_of(node)}
        # entries that a parameter had none of when it was saved must not outlive the load
        match.replaced[prefix] = set(heads)
        self.settled.update(self._subtrees.at_or_below(prefix))
        for head, (key, child) in heads.items():
            was_parameter = f"{mapping.model}.{text_of(key)}" in self._names
            if mapping.takes is not None and not mapping.takes(key, was_parameter):
                continue  # another stage's of a pipeline, or nobody's
            mine = self._subtrees.at_or_below(head)
            saved = leaf_names(child, head)
            if (reason := misfit(mapping, self._targets, self._names, key, saved)) is not None:
                self.misfits += [(name, reason) for name in saved]  # what the state has stays
            elif mine and set(mine) == set(saved) and all(map(self._tensors.is_of_one_kind, mine)):
                # of the saved form: filled in place, name by name, as any tensor is
                self.settled.difference_update(mine)
            else:
                self._grow(prefix, key, child)

    def _match_grown(self, prefix: str, accepts: Callable[[str], bool]) -> None:
        inside = f"{prefix}."
        owned = self._targets.wholes.keys() | self._targets.statefuls.keys()
        _, node = locate(self._structure, prefix)
        for key, child in children_of(node):
            below = f"{inside}{key}"
            if accepts(str(key)) and below not in owned and not self._subtrees.at_or_below(below):
                self._grow(prefix, key, child)

    def _grow(self, prefix: str, key: Any, node: Tree) -> None:
        name = f"{prefix}.{key}"
        self._match.grown.setdefault(prefix, []).append((key, name))
        self._match.nodes[name] = node
        self._tensors.take(leaf_names(node, name))


def _is_per_rank(node: Tree) -> bool:
    """Whether ranks saved this for themselves: until it was each rank's own, RNGState was saved once."""
    return any(str(key).startswith(PerRank.key("")) for key, _ in children_of(node))
