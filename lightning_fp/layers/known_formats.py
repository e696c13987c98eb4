"""KnownFormats: the formats that a run has named, each with the kernel that multiplies it here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.nn import Module

from lightning_fp.layers.backends import Backend, Resolved, resolve
from lightning_fp.layers.experts.rows import without_history
from lightning_fp.layers.format import LinearFormat, linear_format
from lightning_fp.layers.switchable import SwitchableLayer
from lightning_fp.layers.transformer_engine.setup import check_delayed_is_eager


class KnownFormats:
    """From a name to its format, and from there to its kernel, asked for once.

    Args:
        backend: which kernels to use.
        cuda_fp8: whether CUDA tensors can go to FP8 tensor cores.
    """

    def __init__(self, *, backend: Backend = "auto", cuda_fp8: bool = False) -> None:
        self.backend: Backend = backend
        self.cuda_fp8 = cuda_fp8
        """Known when a device is."""
        self._by_name: dict[str, LinearFormat] = {}
        self._resolved: dict[tuple[LinearFormat, bool], Resolved] = {}

    def __getitem__(self, name: str) -> LinearFormat:
        """The format of a name, also of one that only this run's configuration knows."""
        return self._by_name.get(name) or linear_format(name)

    @property
    def by_chance(self) -> bool:
        """Whether one of them rounds by chance; the run may not be in it yet, or not any more."""
        formats = (*self._by_name.values(), *(format for format, _ in self._resolved))
        return any(format.rounding == "stochastic" for format in formats)

    def add(self, format: LinearFormat, resolved: Resolved | None = None) -> None:
        """Know a format by its name, and its kernel where that was chosen already."""
        self._by_name[format.name] = format
        if resolved is not None:
            self._resolved[format, self.cuda_fp8] = resolved

    def resolve(self, format: LinearFormat) -> Resolved:
        """A format with its kernel here.

        Raises:
            ValueError: if the backend cannot run it.
        """
        key = format, self.cuda_fp8
        if key not in self._resolved:
            self._resolved[key] = resolve(format, self.backend, cuda_fp8=self.cuda_fp8)
        return self._resolved[key]

    @staticmethod
    def taken(layer: SwitchableLayer, format: LinearFormat) -> LinearFormat:
        """What a layer makes of a format: experts scale from what they see now."""
        return format if layer.keeps_history else without_history(format)

    def can_run(self, layer: SwitchableLayer, format: LinearFormat) -> bool:
        """Whether a layer can run a format with this backend, on this hardware, in its shape."""
        try:
            resolved = self.resolve(self.taken(layer, format))
        except ValueError:
            return False
        return resolved.refusal is None and resolved.fits(layer.in_features, layer.out_features)

    def check(
        self,
        resolved: Resolved,
        names: Sequence[str],
        layers: Mapping[str, SwitchableLayer],
        model: Module | None,
    ) -> None:
        """Refuse here, not in the next step, what layers cannot run.

        FP8 hardware multiplies whole blocks only.

        Args:
            resolved: the format, with its kernel.
            names: the layers it is meant for.
            layers: all layers by name.
            model: whose layers these are.

        Raises:
            ValueError: naming the format, and the layer where it is a layer's shape.
        """
        format = resolved.format
        if (refusal := resolved.refusal) is not None:
            raise ValueError(f"format {format.name!r} cannot run here: {refusal}")
        if self.backend == "transformer-engine" and format.scaling == "delayed":
            check_delayed_is_eager(model, names)
        for name in names:
            layer = layers[name]
            if not resolved.fits(layer.in_features, layer.out_features):
                raise ValueError(
                    f"layer {name!r} cannot run {format.name!r}: in_features and out_features must"
                    f" be multiples of {resolved.alignment}, got {layer.in_features} and"
                    f" {layer.out_features}; leave it in high precision"
                )
