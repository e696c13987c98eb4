"""From Lightning's precision plugins, and from other libraries' options, to ours."""

from lightning_fp.plugins.migration.libraries import Migration, from_options
from lightning_fp.plugins.migration.lightning import from_lightning
from lightning_fp.plugins.migration.megatron import from_megatron

__all__ = ["Migration", "from_lightning", "from_megatron", "from_options"]
