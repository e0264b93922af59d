"""Loaded runs → the HTML page, the Markdown page and the plot files.

In: run logs. Out: files in one folder, written all together or not at all. Both pages are filled from the same content, so they
agree.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from . import text
from .content import page_content
from .load import load_runs
from .summary import as_json
from .write import write_all

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from .figures import Panel

_BEGIN, _END = "<!-- interp_rlhf: begin -->", "<!-- interp_rlhf: end -->"


def write_report(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    title: str | None = None,
) -> list[Path]:
    """Write run logs as one self-contained HTML page, one Markdown page, one JSON file and one SVG file per plot.

    Args:
        runs (`Sequence[str | Path]`): run logs, or folders. A folder means every `interp.jsonl` below it, sorted. The plots show
            all arms over each other.
        out (`str | Path`): the HTML page, such as `runs/demo/report.html`. `report.md`, `report.json` and the folder
            `report_plots` are written next to it, named after the page.
        title (`str`, *optional*): heading of the page. Defaults to the title that the runs share.

    Returns:
        `list[Path]`: the files written: plots, JSON, Markdown, HTML. The same logs give the same bytes.

    Raises:
        `ValueError`: no run, a log without a complete event, an `out` that does not end in `.html`, or one next to which a
            Markdown or JSON file of that name is not of an earlier report.
        `FileNotFoundError`: a path that does not exist, or a folder without a run log.
        `OSError`: the files cannot be written (a full disk). No temporary file is left, an earlier report stays.

    Example:
        >>> from interp_rlhf import write_report
        >>> from interp_rlhf.runlog.log import RunLog
        >>> log = RunLog("run/interp.jsonl")
        >>> log.append("run", 0, title="Warmth", arm="probe", model="tiny", trainer="GRPOTrainer")
        >>> for step in (1, 2):
        ...     log.append("metric", step, metrics={"reward": step / 2})
        >>> [path.name for path in write_report("run", "page.html")]
        ['reward-01-reward.svg', 'page.json', 'page.md', 'page.html']
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"`out` is `{out}` – expected an HTML file – pass for example `{out / 'report.html'}`.")
    require_own_pages(out)
    loaded = load_runs(runs)
    content = page_content(loaded, title)
    folder = out.with_name(f"{out.stem}_plots")
    figures = content["figures"] + content["drift_figures"] + [one["figure"] for one in content["patchings"]]
    panels = [panel for figure in figures for panel in figure.panels]
    files = {folder / panel.file: panel.svg for panel in panels}
    content["plots"] = quote(folder.name)
    content["script"] = _shipped_text("page.js")
    content["script_hash"] = base64.b64encode(hashlib.sha256(content["script"].encode()).digest()).decode()
    files[out.with_suffix(".json")] = (
        json.dumps(as_json(loaded, content["title"]), indent=1, ensure_ascii=False) + "\n"
    )
    files[out.with_suffix(".md")] = _render("template.md.j2", content)
    files[out] = _render("template.html.j2", content)
    return write_all(files)


def require_own_pages(out: Path) -> None:
    """Check that no file of somebody else would be replaced: one that is named after the page and is not of an earlier report.

    Raises:
        `ValueError`: a Markdown or JSON file that somebody else wrote, a `README.md` next to `README.html` say.
    """
    for path, own in ((out.with_suffix(".md"), _own_markdown), (out.with_suffix(".json"), _own_json)):
        if path.exists() and not own(path):
            raise ValueError(
                f"`{path}` would be replaced, and it is not of an earlier report – expected no such file. Pass another name for "
                f"the page, such as `{out.with_name('report.html')}`, or move it away."
            )


def _own_markdown(path: Path) -> bool:
    return path.is_file() and b"\n## How to read this\n" in path.read_bytes()


def _own_json(path: Path) -> bool:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and {"title", "runs"} <= set(summary)


def write_model_card(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], card: str | os.PathLike[str]
) -> Path:
    """Put what the runs' logs say into a model card, such as the `README.md` that TRL writes next to a trained model.

    The section stands between two comments. An earlier section is replaced; otherwise the section is added at the end. The rest
    of the card does not change.

    Args:
        runs (`Sequence[str | Path]`): run logs or folders, as for `write_report`.
        card (`str | Path`): the Markdown file. It is made if there is none.

    Raises:
        `ValueError`: a card in which the section begins and does not end.
    """
    path = Path(card)
    section = f"{_BEGIN}\n{_render('model_card.md.j2', page_content(load_runs(runs)))}{_END}\n"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begins, rest = old.partition(_BEGIN)
    _, ends, after = rest.partition(_END)
    if begins and not ends:
        raise ValueError(
            f"`{path}` has `{_BEGIN}` without `{_END}` – expected both, or neither. Remove the first, or add the second."
        )
    new = before + section + after.removeprefix("\n") if begins else old + ("\n" if old else "") + section
    write_all({path: new})
    return path


def _shipped_text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _render(template: str, content: dict[str, Any]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_shipped_text),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "ticks": _ticks,
        "script": Markup,  # our own, and named in the page's policy by its hash
        "inline_svg": lambda panel: Markup(_inline_svg(panel)),
        "markdown": lambda value: Markup(text.markdown(value)),
        "fence": lambda value: Markup(text.fence(value)),
    }
    return environment.get_template(template).render(content)


def _ticks(value: str) -> Any:
    """Text with everything between backticks as code."""
    from markupsafe import Markup, escape

    parts = value.split("`")
    if len(parts) % 2 == 0:  # one of them is only a character
        return escape(value)
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _inline_svg(panel: Panel) -> str:
    """The plot as an element of a page: without XML head and style sheet, and with ids that no other plot has."""
    from markupsafe import escape

    key = panel.file.removesuffix(".svg")
    view = re.search(r'viewBox="([\d. -]+)"', panel.svg)
    assert view, f"{panel.file} has no viewBox"
    body = panel.svg[panel.svg.index(">", view.end()) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(<[^<>]*\s)id="', rf'\g<1>id="{key}-', body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", body)
    return f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(panel.alt)}">{body}'
