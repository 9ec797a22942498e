"""`stayaligned judge`: judge finished completions again, without the model that wrote them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from stayaligned.cli.console import err
from stayaligned.cli.options import Judges, Out, Plugins, component_specs, field_options, load_plugins
from stayaligned.cli.output import print_report
from stayaligned.core.errors import StayalignedError
from stayaligned.experiments.config.experiment import Experiment


@field_options(Experiment, "max_unscored")
def judge(
    source: Annotated[
        str,
        typer.Argument(
            help="Directory of `run`, `evaluate` or `bench`, or a file of completions, also of another tool.",
            show_default=False,
        ),
    ],
    *,
    out_dir: Out,
    judges: Judges = None,
    prompt_set: Annotated[
        Literal["harmful", "benign"] | None,
        typer.Option(help="What another tool's prompts are: ones to refuse (harmful), or ones to answer (benign)."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Source of the prompts, for another tool's rows that have only ids.")
    ] = None,
    plugin: Plugins = None,
    **settings: Any,
) -> None:
    """Judge the completions of a run again.

    The model that wrote the completions is not needed. Name all judges of the new result, the primary judge first;
    verdicts that the run already contains are reused. For completions of another tool (docs/concepts/evidence.md),
    state what their prompts are, and name the columns if need be: rows.jsonl?prompt=question&completion=reply
    """
    from stayaligned.cli.progress import status
    from stayaligned.evaluation.judges import JUDGES
    from stayaligned.experiments.config.packages import require_for_judging
    from stayaligned.experiments.config.validation import parse_component
    from stayaligned.experiments.rejudge import rejudge

    load_plugins(plugin)
    if not judges:
        raise StayalignedError("no judge is named", hint="Give --judge, once or more: --judge keyword.")
    specs = component_specs(judges, "--judge")
    chosen = [parse_component(JUDGES, {"name": s} if isinstance(s, str) else s, "--judge") for s in specs]
    require_for_judging(chosen)
    with status("starting") as progress:
        rejudge(
            source,
            chosen,
            out_dir,
            prompt_set=prompt_set,
            prompts=prompts,
            progress=progress,
            announce=lambda text: err.print(text, soft_wrap=True),
            **settings,
        )
    print_report([out_dir], out_dir)
