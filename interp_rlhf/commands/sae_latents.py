"""`interp-rlhf sae inspect` and `sae find`: pages of latents, and latents that tell two sets of texts apart.

In: parsed arguments. Out: a log and a page, text on the terminal. The search and the inspection are in `validation`.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..concepts.examples import load_examples, make_examples
from ..concepts.readout import Readout
from ..drift.compare import load_texts
from ..embedded import load_or_embedded
from ..report.page import require_own_pages, write_report
from ..runlog.log import RunLog, jsonable
from ..sae.files import load_sae
from ..sae.reading import ReadingOptions
from ..validation.finding import find_latents
from ..validation.inspecting import inspect_latents
from ..validation.judges import EndpointJudge, LocalJudge
from .console import print_aligned, shown_interval
from .options import autoencoder_place, latent_numbers
from .own_files import require_own_log

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..concepts.examples import Examples
    from ..validation.finding import LatentsFound
    from ..validation.inspecting import Inspection, LatentPage
    from ..validation.judges import Judge

_COMMANDS = ("sae inspect", "sae find")  # the first event of their logs names one of them


def sae_inspect(arguments: argparse.Namespace) -> int:
    """`interp-rlhf sae inspect`."""
    started, out = time.monotonic(), _page_path(arguments.out)
    how = ReadingOptions(context_length=arguments.context_length, window=arguments.window)
    texts, chosen = load_texts(arguments.texts), latent_numbers(arguments.latents)
    labelled = load_examples(arguments.labelled, arguments.positive) if arguments.labelled else None
    readouts = [Readout.from_card(path) for path in arguments.probe]
    drawn = arguments.random is not None
    top = arguments.random if drawn else 20 if arguments.top is None else arguments.top
    model, tokenizer, model_id = load_or_embedded(arguments.model)
    sae = load_sae(arguments.sae, model=model, **autoencoder_place(arguments))
    judge = _judge_of(arguments, model, tokenizer, model_id)
    inspection = inspect_latents(
        model, tokenizer, sae, texts, latents="random" if drawn else chosen,
        top=top, contexts=arguments.contexts, labelled=labelled, readouts=readouts, seed=arguments.seed,
        judge=judge, whole=not arguments.only_chosen, how=how, progress=not arguments.json,
    )  # fmt: skip
    files = _write_files(arguments, model_id, "latents", inspection.event(), started, out)
    if arguments.json:
        print(json.dumps(jsonable({**inspection.event(), "files": files})))
        return 0
    _print_inspection(inspection, readouts, labelled is not None)
    print(f"\nchosen: {inspection.chosen}\npage: {files[-1]}")
    return 0


def _judge_of(arguments: argparse.Namespace, model: Any, tokenizer: Any, model_id: str) -> Judge | None:
    """The judge that names latents: the model itself, another local one, or an endpoint."""
    asked = arguments.judge
    if asked is None:
        return None
    if asked == "local":
        return LocalJudge(model, tokenizer, model_id)
    if asked.startswith(("http://", "https://")):
        if arguments.judge_model is None:
            raise ValueError(f"`--judge {asked}` is given without `--judge-model` – expected the model's name there.")
        return EndpointJudge(asked, arguments.judge_model)
    other, its_tokenizer, name = load_or_embedded(asked)
    return LocalJudge(other, its_tokenizer, name)


def _print_inspection(inspection: Inspection, readouts: Sequence[Readout], labelled: bool) -> None:
    whole = inspection.whole
    if whole is not None:
        print(f"{whole.texts} texts, {whole.tokens} tokens: FVU {whole.fvu:.3f}, L0 {whole.l0:.1f}, "
              f"dead {100 * whole.dead:.1f} %")  # fmt: skip
    columns = ["latent", "density", "mean on", "maximum", *(f"cos {readout.name}" for readout in readouts)]
    columns += ["precision", "recall", "AUROC"] if labelled else []
    print_aligned([*columns, "promotes"], [_row_of_page(page) for page in inspection.pages])
    for page in inspection.pages:
        if page.name is not None:
            print(f"latent {page.index}: {page.name}")


def _row_of_page(page: LatentPage) -> list[str]:
    where = page.contexts
    row = [str(page.index), f"{100 * where.density:.3g} %", f"{where.mean:.3g}", f"{where.maximum:.3g}"]
    row += [f"{value:+.2f}" for value in page.cosines.values()]
    if page.detection is not None:
        precision = page.detection.precision
        row += ["–" if precision is None else f"{precision:.2f}", f"{page.detection.recall:.2f}"]
        row += [f"{page.detection.auroc[0]:.2f}"]
    return [*row, " ".join(repr(promoted.piece) for promoted in page.promoted[:5])]


def sae_find(arguments: argparse.Namespace) -> int:
    """`interp-rlhf sae find`."""
    started, out = time.monotonic(), None if arguments.out is None else _page_path(arguments.out)
    examples = _two_sides(arguments.positive, arguments.negative)
    model, tokenizer, model_id = load_or_embedded(arguments.model)
    sae = load_sae(arguments.sae, model=model, **autoencoder_place(arguments))
    latents = find_latents(
        model, tokenizer, sae, examples, arguments.held_out_fraction,
        top=arguments.top, seed=arguments.seed, progress=not arguments.json,
    )  # fmt: skip
    files: list[str] = []
    if out is not None:
        files = _write_files(arguments, model_id, "latents_found", latents.event(), started, out)
    if arguments.json:
        print(json.dumps(jsonable({**latents.event(), "files": files})))
        return 0
    _print_ranking(latents, examples.label_names)
    if files:
        print(f"\npage: {files[-1]}")
    return 0


def _two_sides(positive: str, negative: str) -> Examples:
    """Texts of two files as labelled examples; the labels have the names of the files if these differ."""
    rows = [
        {**(text if isinstance(text, dict) else {"text": text}), "label": label}
        for label, path in ((1, positive), (0, negative))
        for text in load_texts(path)
    ]
    names = Path(negative).stem, Path(positive).stem
    names = names if names[0] != names[1] else ("negative", "positive")
    return replace(make_examples(rows, source=f"{positive} and {negative}"), label_names=names)


def _print_ranking(latents: LatentsFound, names: Sequence[str]) -> None:
    print(f"{latents.examples[0]} examples to choose on, {latents.examples[1]} to report on; {latents.pooling} over tokens; "
          f"L0 {latents.l0:.1f}")  # fmt: skip
    table = [
        [f"latent {one.index}", names[one.sign == 1], f"{one.fit_auroc:.3f}", shown_interval(one.held_out), ""]
        for one in latents.latents
    ]
    table.append(["dense probe", "", "", shown_interval(latents.probe), shown_interval(latents.less_probe, "+")])
    table.append(["TF-IDF", "", "", shown_interval(latents.tfidf), shown_interval(latents.less_tfidf, "+")])
    best = max(latents.random)
    for number, one in enumerate(latents.random, 1):
        less = shown_interval(latents.less_random, "+") if one == best else ""
        table.append([f"random dictionary {number}", "", "", shown_interval(one), less])
    print_aligned(["what", "higher on", "AUROC fit", "AUROC held out", "best latent less this"], table)


def _page_path(path: str) -> Path:
    """Path of the page. It is checked before the work starts.

    Raises:
        `ValueError`: the path is no HTML file, or writing would replace a file that these commands did not write.
    """
    out = Path(path)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"`--out` is `{path}` – expected an HTML file, such as `{out.with_suffix('.html')}`.")
    require_own_log(out.with_name(f"{out.stem}.events.jsonl"), _COMMANDS)
    require_own_pages(out)
    return out


def _write_files(
    arguments: argparse.Namespace, model_id: str, name: str, event: dict[str, Any], started: float, out: Path
) -> list[str]:
    """Write the log and the page; returns their paths, the page last."""
    log = RunLog(out.with_name(f"{out.stem}.events.jsonl"))
    require_own_log(log.path, _COMMANDS)
    log.path.unlink(missing_ok=True)
    settings = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("run", "json", "out") and value is not None and value != [] and value is not False
    }
    command = arguments.run[1].replace("_", " ")
    log.append("run", title=f"Latents of {arguments.sae}", arm=command, model=model_id, settings=settings)
    log.append(name, **event)
    log.append("end", seconds=round(time.monotonic() - started, 3))
    return [str(log.path), *map(str, write_report(log.path, out))]
