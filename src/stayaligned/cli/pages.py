"""The page of the documentation that explains an error."""

from __future__ import annotations

import importlib.metadata
import traceback

from stayaligned.core.errors import StayalignedError

_PAGES = {
    "concepts/evidence": ("cli.evaluate", "cli.judge", "evaluation", "experiments.rejudge"),
    "concepts/lisa-theory": ("algorithms.curvature", "cli.curvature", "hf.training.curvature"),
    "howto/align": ("cli.align", "experiments.align", "experiments.config.alignment"),
    "howto/gate": ("cli.gate", "cli.power", "gate"),
    "howto/judges-endpoint": ("evaluation.endpoint",),
    "howto/judges-local": ("evaluation.judges", "hf.judge_models"),
    "howto/label": ("cli.label", "evaluation.labelling"),
    "howto/lisa": (
        *("algorithms.lisa", "algorithms.lisa_schedule", "hf.training"),
        *("defenses.bso", "defenses.lisa", "defenses.mixing"),
    ),
    "howto/report": ("cli.output", "report"),
    "howto/safe-lora": (
        *("algorithms", "cli.project", "cli.subspace", "defenses._projection", "defenses.patching", "weights"),
        *(
            f"defenses.{name}"
            for name in ("safe_lora", "complement", "drop", "drop_other", "random_subspace", "shrink")
        ),
    ),
    "howto/your-own-model": ("attacks", "cli.doctor", "cli.init", "experiments", "hf"),
    "plugins": ("cli.components", "cli.scaffold", "core.component"),
    "reference/architectures": ("hf.targets",),
    "reference/chat-templates": ("hf.jinja", "hf.rendering", "hf.templates"),
    "reference/data": ("data",),
    "reference/defenses": (
        *("algorithms.csulora", "algorithms.objectives", "algorithms.safe_delta", "defenses", "hf.intruders"),
        *(f"hf.training.{name}" for name in ("adapters", "even_rows", "objective", "reference", "row_scores")),
    ),
    "reference/generation": ("hf.generation",),
    "reference/tasks": ("data.prompts", "data.tasks", "hf.lm_eval"),
    "results/testbed": ("testbed",),
}
"""The packages and modules whose errors each page explains.

The innermost one on an error's way counts, and of a package and a module in it the module. Errors of other modules have
the page of their caller.
"""
_OF_MODULE = {f"stayaligned.{module}": page for page, modules in _PAGES.items() for module in modules}


def docs_of(error: StayalignedError) -> str | None:
    """Return where the page on an error is: on the site that the package names, or else in `docs/`."""
    page = error.page or next((page for name in _modules(error) if (page := _page_of(name))), None)
    return None if page is None else place_of(page)


def place_of(page: str) -> str:
    """Return the address of a page if the installed package names a documentation site; else its file."""
    site = next((url for label, url in _project_urls() if label.lower() == "documentation"), None)
    return f"docs/{page}.md" if site is None else f"{site.rstrip('/')}/docs/{page}.html"


def _modules(error: BaseException) -> list[str]:
    """Return the modules through which an error passed, the one that raised it first."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def _page_of(module: str) -> str | None:
    while module and module not in _OF_MODULE:
        module = module.rpartition(".")[0]
    return _OF_MODULE.get(module)


def _project_urls() -> list[tuple[str, str]]:
    try:
        found = importlib.metadata.metadata("stayaligned").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [(label.strip(), url.strip()) for label, _, url in (line.partition(",") for line in found)]
