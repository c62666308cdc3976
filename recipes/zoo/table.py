"""Which network trains as one process does under which layout: measured by ``verify``, kept, and written as a page.

``lightning-dist verify --zoo``, or ``... --zoo '*llama*' --layouts tp=2`` for some of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from lightning_dist.verify import verify
from recipes.zoo.module import OfZoo
from recipes.zoo.networks import kinds

LAYOUTS = ("dp_shard=2", "tp=2", "pp=2", "dp_shard=2,tp=2", "pp=2,dp_shard=2")
STEPS = 3
WORDS = {"same": "exact", "refused": "refused", "differs": "differs", "failed": "failed"}
OWN_SAMPLES = "own samples"
"""Of what differs because BatchNorm sees the samples of its rank alone, as under ddp."""

Cells = dict[str, dict[str, dict[str, str]]]
"""What was found, by network and layout: a word and a sentence."""


def main(
    patterns: Sequence[str] = (),
    layouts: Sequence[str] | None = None,
    folder: Path = Path("outputs/zoo"),
    accelerator: str = "auto",
    timeout: float = 300.0,
) -> int:
    """Measures what the folder does not have yet, and writes ``zoo.json`` and ``SUPPORT.md`` there after each network.

    Args:
        patterns: of names of networks; by default all.
        layouts: by default :data:`LAYOUTS`.
        folder: for both files.
        accelerator, timeout: see :func:`lightning_dist.verify.verify`.

    Returns:
        1 if a network differs by more than BatchNorm's own samples, or fails; else 0.

    Raises:
        ValueError: no network is of such a name.
    """
    asked = [name for name in kinds() if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not asked:
        raise ValueError(f"no network of the zoo is named {' or '.join(patterns)}; '*' stands for any letters")
    for library in ("timm", "torchvision", "transformers"):
        import_module(library)  # what this process has imported, ranks find imported
    wanted, cells = layouts or LAYOUTS, read(folder)
    columns = TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(asked) * len(wanted))
        for name in asked:
            progress.update(task, description=name)
            missing = [layout for layout in wanted if layout not in cells.get(name, {})]
            if missing:
                cells.setdefault(name, {}).update(measured(name, missing, accelerator, timeout))
                write(folder, cells)
            progress.advance(task, len(wanted))
    found = Counter(cells[name][layout]["word"] for name in asked for layout in wanted)
    print(f"{', '.join(f'{count} {word}' for word, count in found.most_common())}; wrote {folder / 'SUPPORT.md'}")
    return int(bool(found["differs"] or found["failed"]))


def measured(name: str, layouts: Sequence[str], accelerator: str, timeout: float) -> dict[str, dict[str, str]]:
    """What is found of one network, by layout."""
    try:
        found = verify(partial(OfZoo, name), None, layouts, steps=STEPS, accelerator=accelerator, timeout=timeout)
    except ValueError as error:  # it does not train in one process
        return {layout: {"word": "failed", "sentence": str(error)} for layout in layouts}
    cells = {}
    for result in found.results:
        word = WORDS[result.status]
        departure = result.departure if result.num_data_ranks > 1 else None
        if departure is not None and _is_in_batch_norm(name, departure.name):
            word = OWN_SAMPLES
        cells[result.layout] = {"word": word, "sentence": "" if result.status == "same" else result.sentence}
    return cells


def _is_in_batch_norm(name: str, module: str) -> bool:
    """Whether a module of a network, by its name, is a BatchNorm or a part of one, as timm's have."""
    network: Any = OfZoo(name)
    for part in module.split("."):
        network = getattr(network, part, None)
        if isinstance(network, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            return True
    return False


def read(folder: Path) -> Cells:
    """What a folder has."""
    file = folder / "zoo.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write(folder: Path, cells: Cells) -> None:
    """Both files; each is whole at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("zoo.json", json.dumps(cells, indent=1) + "\n"), ("SUPPORT.md", page(cells))):
        unfinished = folder / f"{name}.part"
        unfinished.write_text(text)
        unfinished.replace(folder / name)


def page(cells: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """Markdown: a row a network, a column a layout, and why what is refused is."""
    known = [name for name in kinds() if name in cells]
    layouts = [layout for layout in LAYOUTS if any(layout in cells[name] for name in known)]
    reasons: dict[str, int] = {}

    def cell(name: str, layout: str) -> str:
        found = cells[name].get(layout)
        if found is None:
            return ""
        if found["word"] in ("exact", OWN_SAMPLES):
            return found["word"]
        number = reasons.setdefault(found["sentence"], len(reasons) + 1)
        return f"{found['word']} [{number}](#why)"

    rows = [[name, *(cell(name, layout) for layout in layouts)] for name in known]
    head = ["network", *(f"`{layout}`" for layout in layouts)]
    lines = [*_ABOUT, "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *_counts(cells, known, layouts), "", "## Why", ""]
    lines += [f"{number}. {sentence}" for sentence, number in reasons.items()]
    return "\n".join(lines).rstrip() + "\n"


def _counts(cells: Any, known: Sequence[str], layouts: Sequence[str]) -> Iterator[str]:
    for layout in layouts:
        found = Counter(cells[name][layout]["word"] for name in known if layout in cells[name])
        yield f"`{layout}`: {', '.join(f'{count} {word}' for word, count in found.most_common())}.  "


_ABOUT = (
    "# Networks under layouts",
    "",
    f"Small, untrained ones of each kind, {STEPS} steps of AdamW in float64 under a layout beside one process on the",
    "same batches, by `lightning-dist verify --zoo`. *exact*: losses within 1e-9, gradients within 1e-8, and weights",
    "within 1e-5 of how far they have moved (where a network computes a part in float32: 1e-4, 1e-3, and 5e-2, half of",
    f"the entries 1e-3); *{OWN_SAMPLES}*: apart since BatchNorm normalises the samples of a rank alone, as under",
    "`ddp`; *refused*: before any weight changed, with the sentence below.",
    "",
    "- A sample of the table is measured anew with every change.",
    "  `tests/recipes/test_zoo.py::test_a_sample_of_the_table_is_as_it_says`",
)
