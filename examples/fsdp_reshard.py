"""Train with FSDP2 x tensor parallel on 4 ranks; resume on 2, or on any other number, with FSDP2 alone.

    torchrun --nproc-per-node 4 fsdp_reshard.py --out checkpoints/fsdp   # a job
    torchrun --nproc-per-node 2 fsdp_reshard.py --out checkpoints/fsdp   # resumes it
    python fsdp_reshard.py                                               # both as a story, see fsdp_story.py

In: the text of CPython's own help topics, for a byte-level model built as Llama is. Out: checkpoints below
--out, from which a job of any layout goes on with the batches and random numbers that would have come next.
`train` and `Trainer` are the parts to copy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import random
import signal
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from dcp_async import (
    AppState,
    CheckpointEngine,
    Every,
    LoadReport,
    PerRank,
    RNGState,
    SaveCommitted,
    SaveFailed,
    SaveStarted,
    Timeouts,
)

BYTES = 256


async def train(options: argparse.Namespace, report: Report) -> None:
    """Train to `options.steps` steps, from the newest whole checkpoint, of whatever layout. Ranks: all."""
    trainer = Trainer(options)
    timeouts = Timeouts(coordination=options.patience)

    policy = Every(steps=options.save_every)

    async with CheckpointEngine(options.out, policy=policy, timeouts=timeouts, observer=report) as engine:
        loaded = await engine.load(trainer.state) if await engine.latest() else None
        start = loaded.next_step if loaded else 1
        report.started(loaded, trainer)
        if options.dump and loaded:
            dump_full_state(trainer, options.dump)

        last = max(start - 1, options.steps)
        # torchrun sends each rank a SIGTERM when it is told to end or one of them failed, and SIGKILL 30 s
        # behind it. All save at one step then; where one is lost, each of the others finds out and says so.
        async with engine.preemption(signal.SIGTERM, grace=25):
            for step in range(start, options.steps + 1):
                loss = trainer.step()  # blocks this loop; the engine has one of its own, uploads go on
                report.stepped(step, loss)

                if engine.should_save(step):
                    await engine.save(trainer.state, step=step)
                if engine.preempted:
                    last = step
                    break

    # Leaving the engine's block waited for the last upload: what was saved is on the disk.
    outcome = "stopped, as it was told to, behind" if engine.preempted else "done at"
    report.line("finished", f"{outcome} step {last}" if report.rank == 0 else None)


class Trainer:
    """A rank's part of a training run; `state` names all that its next steps depend on."""

    def __init__(self, options: argparse.Namespace) -> None:
        world = dist.get_world_size()
        tp = options.tp or (2 if world % 4 == 0 else 1)
        if world % tp:
            raise ValueError(f"--tp {tp} does not divide {world} ranks")
        # Row by row: ranks 0 and 1 are the tensor-parallel halves of the first data-parallel rank.
        mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))
        self._dp = mesh["dp"]
        dp_rank, dp_size = self._dp.get_local_rank(), self._dp.size()

        torch.manual_seed(options.seed)  # the same weights on all ranks
        model = Llama(width=options.width, depth=options.depth, heads=options.heads, context=options.context)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if tp > 1:
            apply_tensor_parallel(model, mesh["tp"])
        for layer in model.layers:
            fully_shard(layer, mesh=self._dp)
        fully_shard(model, mesh=self._dp)
        self.model = model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.95))
        self.data = Batches(global_batch=options.global_batch, context=options.context, seed=options.seed)
        self._rows = slice_of(options.global_batch, dp_rank, dp_size)
        self._noise = options.noise

        torch.manual_seed(options.seed + 1 + dp_rank)  # tensor-parallel peers draw the same noise
        self.state: dict[str, Any] = {
            "app": AppState(self.model, self.optimizer),
            "data": self.data,
            # On another number of ranks: each takes over from the rank whose place in the batch it is at.
            "rng": PerRank(RNGState(), on_resize=lambda saved: saved[dp_rank * len(saved) // dp_size]),
        }

    def step(self) -> float:
        """Take one step; returns the loss over the global batch, in nats a byte."""
        tokens = next(self.data)[self._rows]
        noisy = torch.rand(tokens.shape) < self._noise
        inputs = torch.where(noisy, torch.randint_like(tokens, BYTES), tokens)
        logits = self.model(inputs[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        self.optimizer.step()
        mean = loss.detach() / self._dp.size()
        dist.all_reduce(mean, group=self._dp.get_group())
        return float(mean.item())


class Batches:
    """Windows of the text; which ones a step gets depends on its number and on nothing else."""

    def __init__(self, *, global_batch: int, context: int, seed: int) -> None:
        text = "".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()
        self._windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, context + 1, context)
        self._global_batch, self._seed = global_batch, seed
        self._step = 0  # of the last batch

    def __next__(self) -> Tensor:
        """The next global batch, (batch, context + 1); a rank takes its rows of it."""
        per_epoch = len(self._windows) // self._global_batch
        epoch, index = divmod(self._step, per_epoch)
        order = random.Random(f"{self._seed}, {epoch}").sample(range(len(self._windows)), len(self._windows))
        self._step += 1
        return self._windows[order[index * self._global_batch :][: self._global_batch]].long()

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step, "global_batch": self._global_batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["global_batch"] != self._global_batch:
            raise ValueError(
                f"trained with --global-batch {state['global_batch']}, and other batches would come now"
            )
        self._step = state["step"]


def slice_of(total: int, rank: int, size: int) -> slice:
    """The rows of a global batch that data-parallel rank `rank` trains on."""
    if total % size:
        raise ValueError(f"--global-batch {total} can't be shared out among {size} data-parallel ranks")
    return slice(rank * total // size, (rank + 1) * total // size)


class Llama(nn.Module):
    """Logits of the next byte at each place of (batch, time) bytes; names are those of Llama's own code."""

    rotations: Tensor

    def __init__(self, *, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(BYTES, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, BYTES, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(context), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tok_embeddings(tokens)
        for layer in self.layers:
            hidden = layer(hidden, self.rotations[: tokens.shape[1]])
        logits: Tensor = self.output(self.norm(hidden))
        return logits


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)
        self.attention_norm = nn.RMSNorm(width)
        self.ffn_norm = nn.RMSNorm(width)

    def forward(self, hidden: Tensor, rotations: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), rotations)
        output: Tensor = hidden + self.feed_forward(self.ffn_norm(hidden))
        return output


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._head_width = width // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, hidden: Tensor, rotations: Tensor) -> Tensor:
        # Under tensor parallelism a rank has some of the heads, so their number is not written down here.
        batch, time_, _ = hidden.shape
        q, k, v = (
            part(hidden).view(batch, time_, -1, self._head_width) for part in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, rotations), rotate(k, rotations)
        heads = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        output: Tensor = self.wo(heads.transpose(1, 2).flatten(2))
        return output


def rotate(heads: Tensor, rotations: Tensor) -> Tensor:
    """RoPE: turn the pairs of each head by angles that depend on the place."""
    pairs = torch.view_as_complex(heads.view(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations[:, None]).flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 32 * round(8 * width / 3 / 32)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.w2(nn.functional.silu(self.w1(hidden)) * self.w3(hidden))
        return output


def apply_tensor_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Split the matrices of each layer over `mesh`, and what lies between the layers along the text."""
    parallelize_module(
        model,
        mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    for layer in model.layers:
        parallelize_module(
            layer,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
                ),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
                "ffn_norm": SequenceParallel(),
                "feed_forward": PrepareModuleInput(
                    input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
                ),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
                "feed_forward.w3": ColwiseParallel(),
            },
        )


def dump_full_state(trainer: Trainer, path: str) -> None:
    """Write weights and optimizer as whole tensors, put together by torch's own collectives. Ranks: all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optim = get_state_dict(trainer.model, trainer.optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save({"model": model, "optim": optim}, path)


class Report:
    """A rank's lines on stdout: text of rank 0 and of failures, or with `--json` all of it, for the story.

    It is the engine's observer too. `on_event` runs on the engine's thread, so a line is one write.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.rank = int(os.environ["RANK"])
        self._json, self._log_every = options.json, options.log_every

    def started(self, loaded: LoadReport | None, trainer: Trainer) -> None:
        name = "layers.0.attention.wq.weight"
        weight = trainer.model.get_parameter(name)
        assert isinstance(weight, DTensor)
        layout = f"{name}: {list(weight.to_local().shape)} of {list(weight.shape)}, {weight.placements}"
        origin = f"resumed from step {loaded.step}" if loaded else "fresh start"
        self.line(
            "started",
            f"{origin} on {dist.get_world_size()} ranks: {trainer.num_parameters / 1e6:.2f} M parameters"
            if self.rank == 0
            else None,
            pid=os.getpid(),
            resumed_from=loaded.step if loaded else None,
            layout=layout,
            num_parameters=trainer.num_parameters,
        )

    def stepped(self, step: int, loss: float) -> None:
        if self.rank == 0:
            shown = step % self._log_every == 0
            self.line("step", f"step {step:>4}  loss {loss:.3f}" if shown else None, step=step, loss=loss)

    def on_event(self, event: object) -> None:
        match event:
            case SaveStarted():
                self.line("save_started", None, step=event.step)
            case SaveCommitted() if self.rank == 0:
                text = (
                    f"step {event.step:>4}  saved: {event.info.nbytes / 1e6:.1f} MB in {event.seconds:.2f} s"
                )
                self.line("committed", text, step=event.step)
            case SaveFailed():
                text = f"rank {self.rank}: {event.error}"
                lost = [rank for rank in event.error.failures if rank != self.rank]
                self.line("save_failed", text, step=event.step, lost=lost)

    def line(self, kind: str, text: str | None, **facts: object) -> None:
        if self._json:
            text = json.dumps({"event": kind, "rank": self.rank, "text": text, **facts})
        if text is not None:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def run_rank(options: argparse.Namespace) -> int:
    """One process of a job that torchrun started."""
    report = Report(options)
    torch.set_num_threads(1)
    # Tensor-parallel logits are a view, which must not be changed in place; nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    # Only what no rank will ever answer takes so long; a rank that dies is noticed at once.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        asyncio.run(train(options, report))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        report.line("stopped", f"rank {report.rank} stops: {text}", error=text)
        return 1
    dist.destroy_process_group()
    return 0


def parse_options() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=72, help="train until this step (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=12, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--log-every", type=int, default=6, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--patience", type=float, default=8, metavar="SECONDS", help="with a silent rank")
    parser.add_argument("--seed", type=int, default=0)

    model = parser.add_argument_group("model and data")
    model.add_argument("--width", type=int, default=128)
    model.add_argument("--depth", type=int, default=2)
    model.add_argument("--heads", type=int, default=4)
    model.add_argument("--context", type=int, default=64, metavar="BYTES")
    model.add_argument("--global-batch", type=int, default=16, help="over all ranks (default: %(default)s)")
    model.add_argument("--noise", type=float, default=0.02, help="how much of the input is random bytes")
    model.add_argument("--lr", type=float, default=3e-3)
    shared = list(vars(parser.parse_args([])))

    job = parser.add_argument_group("a job, under torchrun")
    job.add_argument("--out", default="checkpoints/fsdp", metavar="DIR", help="resumes if it holds any")
    job.add_argument(
        "--tp", type=int, help="tensor-parallel ranks (default: 2 where 4 divides the ranks, else 1)"
    )
    job.add_argument("--json", action="store_true", help="JSON lines, of all ranks")
    job.add_argument("--dump", metavar="FILE", help="for whole tensors of what a resumed job begins with")

    story = parser.add_argument_group("the story, without torchrun")
    story.add_argument(
        "--lose-at", type=int, default=36, metavar="STEP", help="in a save of it or a later one"
    )
    story.add_argument("--chart", default="fsdp_reshard.svg", metavar="FILE", help="default: %(default)s")
    story.add_argument("--dir", default=".", help="for a temporary directory of checkpoints (default: here)")
    parser.set_defaults(shared=shared)
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if "RANK" in os.environ:
        return run_rank(options)
    import fsdp_story  # no part of a job

    return fsdp_story.main(options)


if __name__ == "__main__":
    sys.exit(main())
