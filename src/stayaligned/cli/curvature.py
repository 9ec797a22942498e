"""`stayaligned curvature`: compare Lisa's rho with the smoothness that its convergence theorem requires."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stayaligned.cli.console import note, out, plain_table
from stayaligned.cli.modes import answer
from stayaligned.cli.options import field_options
from stayaligned.core.errors import StayalignedError
from stayaligned.core.settings import CurvatureSettings
from stayaligned.core.text import visible

if TYPE_CHECKING:
    from stayaligned.algorithms.curvature import Eigenvalue
    from stayaligned.hf.training.curvature import LossCurvature


@field_options(CurvatureSettings)
def curvature(
    model: Annotated[str, typer.Argument(help="The aligned model: directory or hub id.", show_default=False)],
    *,
    data: Annotated[
        list[str],
        typer.Option(help="Rows to learn: a JSONL file or hf://owner/name; repeat it for each of Lisa's data sets."),
    ],
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter of the model; measure in its factors.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A setting of a fresh LoRA, such as r=8; repeatable. By default all weights."),
    ] = None,
    rho: Annotated[float, typer.Option(min=0, help="The rho to compare with L.")] = 1.0,
    **settings: Any,
) -> None:
    """Compare Lisa's rho with the loss's curvature.

    Estimates the smoothness constant L of the training loss at the model's weights. With several data sets, the larger
    L counts.
    """
    from stayaligned.cli.progress import status
    from stayaligned.hf.training.curvature import TrainedWeights, loss_curvatures

    trained = TrainedWeights(model, adapter, _parse_settings(lora) if lora else None)
    with status("loading") as progress:
        found = loss_curvatures(trained, data, CurvatureSettings(**settings), progress)
    _print(found, rho)


def _parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    from stayaligned.experiments.config.yaml_file import parse_value

    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise StayalignedError(f"--lora {pair}: expected key=value", hint="For example: --lora r=8")
        given[key] = parse_value(value)
    return given


def _print(found: Sequence[LossCurvature], rho: float) -> None:
    answer(rho=rho, sources=found)
    table = plain_table("", *(visible(Path(one.source).name) for one in found), numbers=True)
    spectra = [one.spectrum for one in found]
    table.add_row("rows", *(str(one.rows) for one in found))
    table.add_row("loss", *(f"{one.loss:.4g}" for one in found))
    table.add_row("lambda_max", *(_with_error(spectrum.largest) for spectrum in spectra))
    table.add_row("lambda_min", *(_with_error(spectrum.smallest) for spectrum in spectra))
    table.add_row("L", *(_with_error(spectrum.smoothness) for spectrum in spectra))
    table.add_row("rho/L", *(_quotient(rho, spectrum.smoothness.value) for spectrum in spectra))
    out.print(table)
    out.print(f"over {found[0].weights:,} trained weights, {spectra[0].iterations} products with the Hessian\n")
    steepest = max((spectrum.smoothness for spectrum in spectra), key=lambda end: end.value)
    concavity = max(spectrum.concavity for spectrum in spectra)
    out.print(_verdict(rho, steepest), soft_wrap=True)
    if concavity >= rho:
        meaning = f"not above -lambda_min = {concavity:.3g}: around these weights a phase's sub-problem is not convex."
    else:
        meaning = f"above -lambda_min = {concavity:.3g}: around these weights each phase's sub-problem is convex."
    out.print(f"rho = {rho:g} is {meaning}", soft_wrap=True)
    if steepest.error > 0.05 * steepest.value:
        note(f"L is only known to ± {steepest.error:.2g}; raise --iterations")


def _verdict(rho: float, steepest: Eigenvalue) -> str:
    """Compare rho with the theorem's condition; the measured L is a lower bound of the theorem's, which is global."""
    times = f"rho = {rho:g} is {_quotient(rho, steepest.value)} x L"
    if rho <= steepest.value:
        return f"{times}: the convergence theorem (rho > L) does not apply."
    if rho <= steepest.value + steepest.error:
        return f"{times}, within L's error: the convergence theorem (rho > L) may or may not apply."
    return f"{times} at these weights; the convergence theorem requires rho > L at all weights, and exact sub-solves."


def _quotient(rho: float, smoothness: float) -> str:
    return f"{rho / smoothness:.2g}" if smoothness > 0 else "inf"


def _with_error(end: Eigenvalue) -> str:
    return f"{end.value:.4g} ± {end.error:.1g}"
