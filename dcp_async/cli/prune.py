"""``dcp-async prune``: removes what a retention policy does not keep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import click

from ..catalog import (
    KeepBest,
    KeepEvery,
    KeepLatest,
    Listed,
    Retention,
    RetentionPlan,
    plan_retention,
    survey,
)
from ..storage import InUseError
from .places import Place, no_metadata, run, storage_of
from .removal import Condemned, confirm, dry_run_option, entry, remove, report, yes_option
from .terminal import Column, common, wants_json, write, write_table

_COLUMNS = (Column("KEPT", least=12), Column("BY", least=12, is_prose=True))


class _Best(click.ParamType[KeepBest]):
    """``loss:2`` or ``accuracy:2:max``."""

    name = "NOTE:N[:max]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> KeepBest:
        if isinstance(value, KeepBest):
            return value
        head, _, last = str(value).rpartition(":")
        mode = last if last in ("min", "max") else "min"
        note, _, number = (head if last == mode else str(value)).rpartition(":")
        if not note or not number.isdecimal() or int(number) < 1:
            self.fail(f"{value!r} is not NOTE:N or NOTE:N:max, such as loss:2", param, ctx)
        return KeepBest(note, int(number), mode="max" if mode == "max" else "min")


@click.command(short_help="Remove what a retention policy does not keep.")
@click.argument("root", type=Place())
@click.option("--keep-latest", type=click.IntRange(min=1), metavar="N", help="Keep the N newest.")
@click.option(
    "--keep-every-steps", type=click.IntRange(min=1), metavar="N", help="Keep the first of every N steps."
)
@click.option(
    "--keep-every-seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Keep the first of every S seconds.",
)
@click.option(
    "--keep-best",
    type=_Best(),
    multiple=True,
    metavar="NOTE:N[:max]",
    help="Keep the N with the least number under NOTE, or the greatest; may be repeated.",
)
@dry_run_option
@yes_option
@common
def prune(
    root: str,
    keep_latest: int | None,
    keep_every_steps: int | None,
    keep_every_seconds: float | None,
    keep_best: Sequence[KeepBest],
    dry_run: bool,
    yes: bool,
) -> None:
    """Remove the checkpoints under ROOT that none of the --keep options keeps.

    What one of them keeps stays; so do the newest that is whole, those without a step, those that a link
    leads to, those that can't be read, and those that are being read. What is found damaged stays, and
    counts for none of those that are kept.
    """
    policies: list[Retention] = list(keep_best)
    if keep_latest is not None:
        policies.append(KeepLatest(keep_latest))
    if keep_every_steps is not None or keep_every_seconds is not None:
        policies.append(KeepEvery(steps=keep_every_steps, seconds=keep_every_seconds))
    if not policies:
        raise click.UsageError("say what to keep, with one --keep option at least")
    rows, plan = run(_planned(root, reduce(or_, policies)))
    condemned = [Condemned(os.path.join(root, name), rows[name]) for name in plan.removed]
    if not wants_json():
        if plan.kept:
            write_table(_COLUMNS, [[name, ", ".join(why)] for name, why in plan.kept.items()])
        if not condemned:
            write("nothing to remove")
            return
        write("")
    confirm(condemned, dry_run=dry_run, yes=yes)
    entries = [entry(checkpoint) for checkpoint in condemned] if dry_run else run(_removed(root, condemned))
    report(entries, dry_run=dry_run, kept={name: list(why) for name, why in plan.kept.items()})


async def _planned(root: str, policy: Retention) -> tuple[dict[str, Listed], RetentionPlan]:
    async with storage_of(root) as storage:
        listed = await survey(storage, no_metadata)
    rows = {row.stored.name: row for row in listed if row.stored.committed}
    infos = [row.info for row in rows.values() if row.info is not None]
    # a link is somebody's word that what it leads to shall stay
    linked = {row.stored.alias_of: f"the link {row.stored.name!r}" for row in listed if row.stored.alias_of}
    plan = plan_retention(infos, policy, pinned=linked)
    if plan.removed:
        from .opened import plan_of  # torch, where nothing would go without it

        # those that are damaged count for nothing: a run goes on from what is whole
        plan = await plan_of(root, policy)
    # neither what was not listed, nobody being asked about it, nor what does not say what it is
    removed = tuple(name for name in plan.removed if name in rows and rows[name].info is not None)
    others = {
        name: ("can't be read" if row.info is None else "not whole",)
        for name, row in rows.items()
        if name not in plan.kept and name not in removed
    }
    return rows, RetentionPlan(kept={**plan.kept, **others}, removed=removed)


async def _removed(root: str, condemned: Iterable[Condemned]) -> list[dict[str, Any]]:
    entries = []
    async with storage_of(root) as storage:
        for checkpoint in condemned:
            try:
                left = await remove(storage, checkpoint.row.stored.name)
            except InUseError as error:
                entries.append(entry(checkpoint, why_kept=error))
            else:
                entries.append(entry(checkpoint, left))
    return entries
