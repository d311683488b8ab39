"""The drawings of the documentation, each from the few lines that say what it shows.

    python docs/drawings.py

writes them into docs/_static, the same bytes each time: a test compares. Needs nothing but Python. They are
760 wide, which is what the pages have, and bring their own background, for pages that are dark.
"""  # noqa: INP001 - a script beside the pages that show what it draws

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

STATIC = Path(__file__).parent / "_static"
WIDTH = 760

STYLE = """
  text { font: 12px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: #1f2933 }
  .folder { font: 700 13px ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace }
  .small { font-size: 11px; fill: #52606d }
  .head { font-weight: 700; font-size: 13px }
  .number { font-weight: 700; font-size: 11px; fill: #fff; text-anchor: middle }
  .middle { text-anchor: middle }
  .end { text-anchor: end }
  .on { fill: #fff }
"""
INK, PAPER, CALLER, SAVE, LOAD, MEDIUM = "#52606d", "#ffffff", "#fff4e0", "#2166ac", "#1b7837", "#eceff3"
SAVE_FRAME, LOAD_FRAME = "#e8f1fa", "#e7f4ea"
STALL, COPY, SMALL, WRITE, VERIFY = "#c04a37", "#f4a582", "#fddbc7", "#92c5de", "#a6dba0"


class Drawing:
    """Shapes in the order in which they were put down."""

    def __init__(self, height: int, title: str) -> None:
        self._height, self._title = height, title
        self._lines: list[str] = []
        self.box(0.5, 0.5, WIDTH - 1, height - 1, fill=PAPER, stroke="#d5dae0")

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str,
        stroke: str = "none",
        dashed: bool = False,
    ) -> None:
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" '
            f'stroke="{stroke}"{dashes}/>'
        )

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        if not words:
            return
        kinds = f' class="{kind}"' if kind else ""
        self._lines.append(f'<text x="{x:g}" y="{y:g}"{kinds}>{escape(words, quote=False)}</text>')

    def line(
        self, *points: tuple[float, float], color: str = INK, width: float = 1.5, dashed: bool = False
    ) -> None:
        self._path(points, color, width, dashed, head="")

    def arrow(
        self, *points: tuple[float, float], color: str = INK, width: float = 1.5, dashed: bool = False
    ) -> None:
        head = "save" if color == SAVE else "load" if color == LOAD else "ink"
        self._path(points, color, width, dashed, head=f' marker-end="url(#{head})"')

    def _path(
        self, points: tuple[tuple[float, float], ...], color: str, width: float, dashed: bool, head: str
    ) -> None:
        route = " L".join(f"{x:g} {y:g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._lines.append(
            f'<path d="M{route}" fill="none" stroke="{color}" stroke-width="{width:g}"{dashes}{head}/>'
        )

    def step(
        self, x: float, y: float, width: float, number: int, folder: str, words: tuple[str, ...], color: str
    ) -> None:
        """A numbered box: the folder, and what is done there."""
        self.box(x, y, width, 28 + 15 * len(words), fill=PAPER, stroke=color)
        self._lines.append(f'<circle cx="{x + 16:g}" cy="{y + 15:g}" r="9" fill="{color}"/>')
        self.text(x + 16, y + 19, str(number), "number")
        self.text(x + 32, y + 19, folder, "folder")
        for row, line in enumerate(words):
            self.text(x + 12, y + 36 + 15 * row, line)

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto" markerUnits="userSpaceOnUse"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
            for name, color in (("ink", INK), ("save", SAVE), ("load", LOAD))
        )
        start = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height}" '
            f'width="{WIDTH}" height="{self._height}" role="img">'
        )
        title = f"<title>{escape(self._title, quote=False)}</title>"
        return "\n".join(
            [start, title, f"<style>{STYLE}</style>", f"<defs>{heads}</defs>", *self._lines, "</svg>", ""]
        )


def path_of_a_tensor() -> Drawing:
    """A save goes down on the left, a load comes up on the right; the boxes are folders of the package."""
    left, right, width = 44, 420, 296
    d = Drawing(972, "The path of a tensor: a save goes down, a load comes up; the boxes are folders")
    d.box(20, 16, 720, 38, fill=MEDIUM, stroke=INK)
    d.text(380, 40, "the trainer's objects: model, optimizers, schedulers, data loader", "head middle")
    d.text(left + width / 2, 75, "save", "head middle")
    d.text(right + width / 2, 75, "load", "head middle")
    d.box(20, 84, 720, 152, fill=CALLER)
    d.text(28, 228, "the caller's thread", "head")
    for x, folder, fill in ((28, "save/", SAVE_FRAME), (404, "load/", LOAD_FRAME)):
        d.box(x, 246, 328, 472, fill=fill)
        d.text(x + 16, 265, folder, "folder")
        d.text(x + 62, 265, "the loop's thread", "small")
        d.text(x + 172, 265, "bounded queues", "small")
    d.box(20, 734, 720, 50, fill=MEDIUM, stroke=INK)
    d.text(380, 755, "a checkpoint: a directory of the storage", "head middle")
    d.text(380, 773, "__0_0-<uid>.distcp, one per rank; manifest-<uid>.json; .metadata", "small middle")

    saving = [
        (92, "engine/", ("admits one verb after the other",)),
        (156, "state/", ("asks each state_dict() once; flat lists",)),
        (
            276,
            "planning/",
            ("who writes what, and where every byte lies:", "once per plan, agreed by all ranks"),
        ),
        (366, "staging/", ("one batched copy into leased slots;", "then save() returns")),
        (456, "storage/", ("writes whole parts where they belong",)),
        (531, "formats/", ("xxh3_64 of each 64 KiB; slots free again",)),
        (
            606,
            "storage/",
            ("commits, once every rank's file is there:", "files synced, manifest, .metadata last"),
        ),
    ]
    for number, (y, folder, words) in enumerate(saving, 1):
        d.step(left, y, width, number, folder, words, SAVE)
    middle = left + width / 2
    for start, end, what in (
        (135, 155, ""),
        (199, 275, "a request: references to tensors"),
        (334, 365, "numbers of parts"),
        (424, 455, "staged parts, in slots"),
        (499, 530, "written parts"),
        (574, 605, "each rank's file, digest"),
        (664, 733, "now the checkpoint exists"),
    ):
        d.arrow((middle, start), (middle, end), color=SAVE)
        d.text(middle + 8, min((start + end) / 2 + 3, 690, start + 21), what, "small")
    d.arrow((left, 477), (36, 477), (36, 733), color=SAVE, width=3)

    loading = [
        (92, 8, "state/", ("hands it back: load_state_dict() once",)),
        (156, 2, "state/", ("looks for memory to read into",)),
        (
            276,
            7,
            "load/",
            ("places what could not be read in place:", "strided targets, other dtypes, small pieces"),
        ),
        (366, 6, "trust/", ("unpickles leaves by an allow-list",)),
        (441, 5, "formats/", ("verifies each block, takes items apart",)),
        (516, 4, "storage/", ("reads, straight into targets where it can",)),
        (591, 3, "load/", ("matches every name, shape and dtype,", "then plans block-aligned ranges")),
        (667, 1, "catalog/", ("opens the newest one that is whole",)),
    ]
    for y, number, folder, words in loading:
        d.step(right, y, width, number, folder, words, LOAD)
    middle = right + width / 2
    for start, end, what in (
        (733, 711, ""),
        (666, 650, ""),
        (590, 560, "spans"),
        (515, 485, "buffers"),
        (440, 410, ""),
        (365, 335, ""),
    ):
        d.arrow((middle, start), (middle, end), color=LOAD)
        d.text(middle + 8, (start + end) / 2 + 4, what, "small")
    d.arrow((middle, 275), (middle, 222), (726, 222), (726, 113), (717, 113), color=LOAD)
    d.arrow((right, 177), (412, 177), (412, 620), (419, 620), color=LOAD, dashed=True)
    d.arrow((726, 733), (726, 537), (717, 537), color=LOAD, width=3)

    d.text(20, 806, "Underneath, used by both:", "small")
    for x, folder, first, second in (
        (20, "coordination/", "every rank sends, one decides,", "all hear; no collectives"),
        (266, "_concurrency/", "the loop's thread, threads for", "blocking calls, bounded queues"),
        (512, "trust/", "every unpickler, and what", "each may call"),
    ):
        d.box(x, 814, 228, 64, fill=PAPER, stroke=INK)
        d.text(x + 12, 834, folder, "folder")
        d.text(x + 12, 851, first)
        d.text(x + 12, 867, second)
    d.text(20, 898, "Instead of the engine, where the calls are torch.distributed.checkpoint's:", "small")
    d.box(20, 906, 720, 48, fill=PAPER, stroke=INK)
    d.text(32, 926, "interop/", "folder")
    d.text(32, 943, "stock plans the save or load; the same save/, load/, formats/ and storage/ carry it out")
    return d


def beside_training() -> Drawing:
    """One save in time: what the trainer does, and what the engine does meanwhile. Not to scale."""
    d = Drawing(262, "A save beside training: steps go on while the engine writes; not to scale")
    left, step = 112, 54
    stall, returned, durable = left + 3 * step, left + 3 * step + 54, left + 3 * step + 350
    for y, name in ((40, "your steps"), (84, "stage"), (118, "write"), (152, "checksum"), (186, "commit")):
        d.text(left - 12, y + 17, name, "end head" if y == 40 else "end")
    d.text(left, 27, "time", "small")
    d.arrow((left + 30, 23), (left + 90, 23))
    for number in range(98, 108):
        x = left + step * (number - 98) + (step if number > 100 else 0)
        d.box(x, 40, step - 4, 26, fill=SAVE)
        d.text(x + step / 2 - 2, 57, str(number), "middle on")
    d.box(stall, 40, step - 4, 26, fill="#c04a37")
    d.text(stall + step / 2 - 2, 57, "save()", "middle on")
    d.box(stall, 84, step - 4, 26, fill="#f4a582")
    d.text(returned + 8, 101, "one batched copy into a pool that is kept", "small")
    d.box(stall + 14, 118, 250, 26, fill="#92c5de")
    d.text(returned + 8, 135, "each part goes to disk as it is")
    d.box(returned, 152, 246, 26, fill="#92c5de")
    d.text(returned + 8, 169, "of every 64 KiB, once you don't wait")
    d.box(durable - 48, 186, 46, 26, fill=LOAD)
    d.text(durable - 25, 203, "sync", "middle on")
    for x in (returned - 2, durable):
        d.line((x, 34), (x, 224), dashed=True)
    d.text(returned - 6, 238, "save() has returned:", "small end")
    d.text(returned - 6, 252, "the state may change", "small end")
    d.text(durable - 4, 238, "durable: .metadata appears, and", "small end")
    d.text(durable - 4, 252, "with it the checkpoint exists", "small end")
    return d


class Queues:
    """One line for each of several queues, and what runs in them from left to right."""

    LEFT, ROW = 126, 30

    def __init__(self, drawing: Drawing, top: float, title: str, names: tuple[str, ...]) -> None:
        self._drawing, self._top = drawing, top
        drawing.text(16, top + 16, title, "head")
        for row, name in enumerate(names):
            drawing.text(self.LEFT - 10, self._y(row) + 16, name, "end")
            drawing.line((self.LEFT, self._y(row) + 27), (744, self._y(row) + 27), color="#e3e8ed", width=1)

    def _y(self, row: int) -> float:
        return self._top + 28 + self.ROW * row

    def run(self, row: int, start: float, end: float, words: str, fill: str) -> None:
        self._drawing.box(self.LEFT + start, self._y(row), end - start - 3, 24, fill=fill)
        dark = fill in (SAVE, LOAD, STALL)
        x = self.LEFT + (start + end - 3) / 2
        self._drawing.text(x, self._y(row) + 16, words, "middle on" if dark else "middle")

    def event(self, moment: float, row: int, waiting: int) -> None:
        """What comes next in the other row waits for what ended in this one."""
        x = self.LEFT + moment - 1
        ends = self._y(waiting) + (1 if waiting > row else 24)
        self._drawing.arrow((x, self._y(row) + 12), (x, ends))


def streams_of_a_device() -> Drawing:
    """Saves and a load where the state lies on an accelerator. Not to scale."""
    d = Drawing(578, "Streams over time: a save without and with overlap, and a load; not to scale")
    names = ("your thread", "your stream", "our stream", "copying thread", "writers")

    q = Queues(d, 6, "save() returns when the copies have arrived", names)
    for row, start in ((0, 0), (1, 32)):
        q.run(row, start, start + 96, "step 1", SAVE)
        q.run(row, start + 366, start + 462, "step 2", SAVE)
        q.run(row, start + 462, start + 558, "step 3", SAVE)
    q.run(0, 96, 366, "save()", STALL)
    q.event(128, 1, 2)
    q.run(2, 130, 178, "pack", SMALL)
    q.run(3, 102, 160, "queues", COPY)
    q.run(3, 160, 362, "sleeps until each run has arrived", MEDIUM)
    _runs(q, copied=178, written=242, width=66)
    q.run(4, 440, 570, "hash, sync, commit", LOAD)

    q = Queues(d, 204, "save() with overlap=True returns when the small tensors are packed", names)
    for row, start in ((0, 0), (1, 32)):
        q.run(row, start, start + 96, "step 1", SAVE)
        q.run(row, start + 400, start + 496, "step 3", SAVE)
    q.run(0, 96, 146, "save()", STALL)
    q.run(0, 146, 268, "forward, backward", SAVE)
    q.run(0, 268, 400, "step() waits", STALL)
    q.run(1, 128, 176, "pack", SMALL)
    q.run(1, 176, 298, "forward, backward", SAVE)
    q.run(1, 370, 432, "update", SAVE)
    q.event(176, 1, 2)
    q.run(3, 148, 206, "queues", COPY)
    q.run(3, 206, 362, "sleeps", MEDIUM)
    _runs(q, copied=178, written=242, width=76)
    q.run(4, 470, 600, "hash, sync, commit", LOAD)

    lanes = ("your thread", "your stream", "readers", "our stream")
    q = Queues(d, 402, "load() comes after what you had queued, and before what you queue next", lanes)
    q.run(0, 0, 64, "init", SAVE)
    q.run(0, 64, 460, "load()", STALL)
    q.run(0, 460, 556, "step 1", SAVE)
    q.run(1, 24, 160, "init", SAVE)
    q.run(1, 482, 578, "step 1", SAVE)
    for number in range(3):
        q.run(2, 72 + 88 * number, 160 + 88 * number, f"read, verify {number + 1}", VERIFY)
        q.run(3, 164 + 88 * number, 226 + 88 * number, f"run {number + 1}", COPY)
    q.event(160, 1, 3)
    q.run(3, 402, 458, "unpack", SMALL)
    q.event(460, 3, 0)
    return d


def _runs(queues: Queues, *, copied: float, written: float, width: float) -> None:
    """A save's runs of parts: through the stream of the copies, then to the disk."""
    for number in range(3):
        arrival = copied + 62 * (number + 1)
        queues.run(2, arrival - 62, arrival, f"run {number + 1}", COPY)
        queues.event(arrival - 1, 2, 3)
        queues.run(4, written + width * number, written + width * (number + 1), f"run {number + 1}", WRITE)


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "path-of-a-tensor.svg": path_of_a_tensor,
    "beside-training.svg": beside_training,
    "streams-of-a-device.svg": streams_of_a_device,
}


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (STATIC / name).write_text(draw().svg())
