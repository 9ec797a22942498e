"""`stayaligned curvature`: how far Lisa's rho is from what its convergence theorem asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stayaligned.cli.console import err, out, plain_table
from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import visible

if TYPE_CHECKING:
    from stayaligned.algorithms.curvature import Eigenvalue
    from stayaligned.hf.training.curvature import LossCurvature


def curvature(
    model: Annotated[str, typer.Argument(help="The aligned model: directory or hub id.", show_default=False)],
    *,
    data: Annotated[
        list[str], typer.Option(help="Rows to learn; repeat for each of Lisa's data sets, and the larger L counts.")
    ],
    adapter: Annotated[Path | None, typer.Option(help="Measure at this LoRA adapter, in its factors.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="key=value of a fresh LoRA, as r=8; repeatable. Else all weights.")
    ] = None,
    rho: Annotated[float, typer.Option(min=0, help="The rho to compare.")] = 1.0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each file, drawn at random.")] = 32,
    iterations: Annotated[
        int, typer.Option(min=1, help="Products with the Hessian; as many copies of the trained weights are kept.")
    ] = 20,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens after which a row is cut.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once; fewer need less memory.")] = 4,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Keep 3 copies instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of rows, fresh LoRA and start.")] = 0,
) -> None:
    """Estimate L of the training loss at these weights, and compare Lisa's rho with it."""
    from stayaligned.hf.training.curvature import CurvatureSettings, TrainedWeights, loss_curvatures

    trained = TrainedWeights(model, adapter, _settings(lora) if lora else None)
    settings = CurvatureSettings(
        rows=rows,
        max_length=max_length,
        batch_size=batch_size,
        iterations=iterations,
        low_memory=low_memory,
        seed=seed,
    )
    with err.status("loading", spinner_style="none") as status:
        found = loss_curvatures(trained, data, settings, lambda text, share: status.update(f"{text} {share:.0%}"))
    _print(found, rho)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    from stayaligned.experiments.config.yaml_file import parse_value

    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise StayalignedError(f"--lora {pair}: not key=value", hint="For example: --lora r=8")
        given[key] = parse_value(value)
    return given


def _print(found: Sequence[LossCurvature], rho: float) -> None:
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
        said = (
            f"not above -lambda_min = {concavity:.3g}: around these weights a state's sub-problem is not even convex."
        )
    else:
        said = f"above -lambda_min = {concavity:.3g}: around these weights each state's sub-problem is convex."
    out.print(f"rho = {rho:g} is {said}", soft_wrap=True)
    if steepest.error > 0.05 * steepest.value:
        err.print(f"note: L is known to ± {steepest.error:.2g} only; raise --iterations", soft_wrap=True)


def _verdict(rho: float, steepest: Eigenvalue) -> str:
    """What the theorem's condition comes to. L here is at most the L that it means, which holds everywhere."""
    times = f"rho = {rho:g} is {_quotient(rho, steepest.value)} x L"
    if rho <= steepest.value:
        return f"{times}: the convergence theorem (rho > L) says nothing here."
    if rho <= steepest.value + steepest.error:
        return f"{times}, within L's error: whether the convergence theorem (rho > L) could apply is open."
    return f"{times} at these weights; the convergence theorem needs rho > L at all weights, and exact sub-solves."


def _quotient(rho: float, smoothness: float) -> str:
    return f"{rho / smoothness:.2g}" if smoothness > 0 else "inf"


def _with_error(end: Eigenvalue) -> str:
    return f"{end.value:.4g} ± {end.error:.1g}"
