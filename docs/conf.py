"""The site, by Sphinx with MyST: `make docs` builds it into site/; a warning is an error."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes

import lightning_fp

project = "lightning_fp"
author = "The lightning_fp authors"
version = release = lightning_fp.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]

NAVIGATION = {
    "Start": [
        "quick-start",
        "examples",
        "which-format",
        "will-it-pay",
        "troubleshooting",
        "glossary",
        "features",
    ],
    "Where it runs": [
        "in-your-own-loop",
        "many-devices",
        "strategy-matrix",
        "fsdp2",
        "fabric",
        "hugging-face",
        "manual-optimization",
        "experts",
        "lora",
        "fp16-training",
        "transformer-engine",
        "migration",
    ],
    "Choose": [
        "formats",
        "simulated-formats",
        "kernels",
        "dynamic-or-delayed",
        "choosing-layers",
        "configuration",
        "command-line",
    ],
    "Roll out": [
        "rollout",
        "baseline",
        "evaluation-gap",
        "measure-before-you-switch",
        "runs-that-fail-by-themselves",
        "stability-reproduction",
    ],
    "Be safe": [
        "when-a-run-diverges",
        "what-a-verdict-rests-on",
        "what-the-watch-costs",
        "fallback-options",
        "rehearsal",
        "detector",
    ],
    "Look": [
        "report",
        "reading-the-clamp-log",
        "clamp-log-columns",
        "clamping-and-spikes",
        "parity-probe",
        "stability-signals",
    ],
    "Reinforcement learning": [
        "rl",
        "rl-matching",
        "training-inference-mismatch",
        "mismatch-before-a-run",
        "mismatch-metrics",
    ],
    "Reference": [
        "api/index",
        "compatibility",
        "versions",
        "on-the-gpu",
        "how-one-step-flows",
    ],
}
"""The pages in the order of the sidebar. They stand here and not in index.md, so that the Markdown
stays plain and reads the same in a checkout."""

# -- Pages -----------------------------------------------------------------------------------------

root_doc = "index"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["images"]
nitpicky = False
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]

# -- Names -----------------------------------------------------------------------------------------

default_role = "py:obj"  # `name` in a docstring links to what it names
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# -- Looks: no fonts, scripts or pictures from elsewhere -------------------------------------------

html_theme = "furo"
html_title = "lightning_fp"
html_copy_source = False
html_show_sphinx = False


# -- What is done to a page as it is read ----------------------------------------------------------


def _as_read(app: Any, page: str, source: list[str]) -> None:
    """Append the sidebar to the first page; links out of docs/ become plain text in the site."""
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            entries = "\n".join(pages)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", source[0])


# -- Links to torch and Lightning, by rules of their own: a build needs no network -----------------

_TORCH = "https://docs.pytorch.org/docs/stable"
_LIGHTNING = "https://lightning.ai/docs/pytorch/stable"
_ELSEWHERE = {
    "torch.Tensor": f"{_TORCH}/tensors.html#torch.Tensor",
    "Tensor": f"{_TORCH}/tensors.html#torch.Tensor",
    "torch.device": f"{_TORCH}/tensor_attributes.html#torch.device",
    "torch.dtype": f"{_TORCH}/tensor_attributes.html#torch.dtype",
    "torch.optim.Optimizer": f"{_TORCH}/optim.html#torch.optim.Optimizer",
    "torch.optim.optimizer.Optimizer": f"{_TORCH}/optim.html#torch.optim.Optimizer",
    "torch.distributed": f"{_TORCH}/distributed.html",
    "lightning.Trainer": f"{_LIGHTNING}/common/trainer.html",
    "lightning.LightningModule": f"{_LIGHTNING}/common/lightning_module.html",
    "LightningModule": f"{_LIGHTNING}/common/lightning_module.html",
    "lightning.pytorch.trainer.trainer.Trainer": f"{_LIGHTNING}/common/trainer.html",
    "lightning.pytorch.core.module.LightningModule": f"{_LIGHTNING}/common/lightning_module.html",
}


def _elsewhere(name: str) -> str | None:
    """The address of something that is not ours; None where no rule is known."""
    name = re.sub(r"^(?:torch\.)?nn\.(?:modules\.\w+\.)?(?=[A-Z])", "torch.nn.", name)
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if re.fullmatch(r"torch\.(nn\.(functional\.)?|amp\.|optim\.|autograd\.)?[A-Za-z]\w+", name):
        return f"{_TORCH}/generated/{name}.html#{name}"
    if re.fullmatch(r"lightning\.pytorch\.(callbacks|loggers|strategies)\.\w+", name):
        return f"{_LIGHTNING}/api/{name}.html#{name}"
    return None


def _resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Called for a name that is not in this site."""
    address = _elsewhere(str(node.get("reftarget", "")))
    if address is None:
        return None
    link = nodes.reference("", "", internal=False, refuri=address)
    link += content.deepcopy()
    return link


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _as_read)
    app.connect("missing-reference", _resolve)
