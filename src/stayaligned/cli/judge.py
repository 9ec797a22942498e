"""`stayaligned judge`: judge finished completions again, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stayaligned.cli.console import err
from stayaligned.cli.options import Judges, Out, Plugins, component_specs, load_plugins
from stayaligned.cli.output import print_report
from stayaligned.core.errors import StayalignedError


def judge(
    source: Annotated[
        Path,
        typer.Argument(help="What `run` or `bench` wrote, or a completions.jsonl.", show_default=False),
    ],
    *,
    out_dir: Out,
    judges: Judges = None,
    max_unscored: Annotated[float, typer.Option(min=0, max=1, help="A larger share of unscored verdicts fails.")] = 0.1,
    plugin: Plugins = None,
) -> None:
    """Judge finished completions again, with the judges named; the model that wrote them is not needed.

    Name all judges of the new result, the primary one first. Verdicts that the run had already are taken over.
    """
    from stayaligned.evaluation.judges import JUDGES
    from stayaligned.experiments.config.validation import parse_component
    from stayaligned.experiments.rejudge import rejudge

    load_plugins(plugin)
    if not judges:
        raise StayalignedError("no judge is named", hint="Give --judge, once or more: --judge keyword.")
    specs = component_specs(judges, "--judge")
    chosen = [parse_component(JUDGES, {"name": s} if isinstance(s, str) else s, "--judge") for s in specs]
    with err.status("starting", spinner_style="none") as status:
        rejudge(
            source,
            chosen,
            out_dir,
            max_unscored=max_unscored,
            progress=lambda text, share: status.update(f"{text} {share:.0%}" if share else text),
            announce=lambda text: err.print(text, soft_wrap=True),
        )
    print_report([out_dir], out_dir)
