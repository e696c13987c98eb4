"""PrecisionMap: the one table of formats, and the only way to change it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from lightning_fp.argument_types import checked
from lightning_fp.layers.attention import attention_mode
from lightning_fp.layers.backends import BackendLike, Resolved, read_backend
from lightning_fp.layers.batch_seeds import BatchSeeds
from lightning_fp.layers.changes import Change, Listener, Write
from lightning_fp.layers.experts.experts import is_switchable_experts
from lightning_fp.layers.format import NAMED_FORMATS, FormatLike, LinearFormat, linear_format
from lightning_fp.layers.fsdp.weights import gather_in_fp8, keep_casts_of_gathered
from lightning_fp.layers.histories.amax_histories import AmaxHistories
from lightning_fp.layers.histories.auto_scaling import AutoScaling
from lightning_fp.layers.histories.delayed_scales import DelayedScales, StepScales, first_device
from lightning_fp.layers.known_formats import KnownFormats
from lightning_fp.layers.lent_formats import lent_formats
from lightning_fp.layers.regions import PatternBudget, compiled_regions, raise_recompile_limit
from lightning_fp.layers.rules import compile_pattern, no_match_message
from lightning_fp.layers.switchable import Gathering, Phase, SwitchableLayer
from lightning_fp.numerics import DelayedScaling
from lightning_fp.state_version import check_version, reads

log = logging.getLogger(__name__)

STATE_VERSION = 1


class PrecisionMap:
    """Every switchable layer and its format.

    Reads are immediate. Writes wait for the next boundary between optimizer steps, where the
    precision plugin calls `apply`; in a plain loop call it yourself. Call `set` alike on all
    ranks. Whoever wrote, the table itself tells what took effect to those who `subscribe`.

    Args:
        backend: which kernels to use.
        cuda_fp8: whether CUDA tensors can go to FP8 tensor cores.
        fp8_eval: whether evaluation runs in the layers' formats.
        delayed: how delayed scales follow from their history.
        auto: when layers move between dynamic and delayed scaling by themselves; None: never.
        attention: the simulated format of attention's products; None: as they are. It is no layer
            and has no row: it stays what it is, in replays in high precision too.
        all_gather: "auto" has FSDP2 gather weights in FP8 where nothing but their cast is used;
            "high" as they are.

    Raises:
        ValueError: for a format of attention that is not simulated, or another all_gather.
    """

    @checked
    def __init__(
        self,
        *,
        backend: BackendLike = "auto",
        cuda_fp8: bool = False,
        fp8_eval: bool = False,
        delayed: DelayedScaling | None = None,
        auto: AutoScaling | None = None,
        attention: FormatLike | None = None,
        all_gather: Gathering = "auto",
    ) -> None:
        backend = read_backend(backend)
        self.phase = Phase(fp8_eval=fp8_eval, all_gather=all_gather)
        self.changes: list[Change] = []
        """Every change of format since the table was filled, oldest first."""

        self._listeners: dict[object, Listener] = {}
        self._noters: dict[object, Callable[[str], object]] = {}
        self.known = KnownFormats(backend=backend, cuda_fp8=cuda_fp8)
        """The formats there are names for, and their kernels."""
        self._model: nn.Module | None = None
        self._layers: dict[str, SwitchableLayer] = {}
        self._configured: dict[str, str] = {}
        self._pending: list[Write] = []
        self._loaded: dict[str, Any] | None = None
        self._budget = PatternBudget()
        self._frozen = False
        self._seeds = BatchSeeds()
        self._sharding_known = False
        asked = NAMED_FORMATS["high"] if attention is None else attention
        self._attention = attention_mode(asked, "attention")
        self.attention = "" if self._attention is None else linear_format(asked).name
        """The format of attention's products; "" for high precision."""
        self._histories = AmaxHistories(backend, delayed or DelayedScaling(), auto)

    # -- reading --------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module | None:
        """The model whose layers these are; None before the table is filled."""
        return self._model

    @property
    def layers(self) -> Mapping[str, SwitchableLayer]:
        """The switchable layers by name."""
        self._let_go()
        return self._layers

    @property
    def frozen(self) -> bool:
        """Whether a replay is going on, in formats of its own; see `overridden`."""
        return self._frozen

    def formats(self) -> dict[str, str]:
        """Every layer's format now, by name; pending writes are not in it yet."""
        converted = {n: layer for n, layer in self._layers.items() if hasattr(layer, "format")}
        return {name: layer.format.name for name, layer in converted.items()}

    @property
    def pending(self) -> bool:
        """Whether a write waits for the next step boundary."""
        return bool(self._pending)

    def configured(self) -> dict[str, str]:
        """Every layer's format as the plugin was configured to give it, by name."""
        return dict(self._configured)

    def matching(self, pattern: str) -> list[str]:
        """The layers that a pattern matches.

        Args:
            pattern: a glob over the whole name, or a regular expression after "re:".

        Returns:
            Those of this rank.

        Raises:
            ValueError: if there is none on any rank; it lists near misses.
        """
        compiled = compile_pattern(pattern)
        self.set_apart(pattern)
        names = [name for name in self.layers if compiled.fullmatch(name)]
        ranks = self.scale_history.ranks
        if ranks.differ and any(map(compiled.fullmatch, ranks.everywhere)):
            return names  # none here perhaps, and some on another rank
        if self._configured and not self._layers:
            raise ValueError(
                f"pattern {pattern!r} matches nothing: this table has no layers any more, another"
                " conversion took them over or revert turned them back; write to the new table"
            )
        if not names:
            raise ValueError(no_match_message(pattern, self._layers))
        return names

    def set_apart(self, pattern: str) -> None:
        """Give rows to single experts that a pattern names, and not the module they are in.

        Args:
            pattern: see `matching`; one that names none changes nothing.
        """
        compiled = compile_pattern(pattern)
        layers: dict[str, SwitchableLayer] = {}
        for name, layer in self.layers.items():
            layers.setdefault(name, layer)
            if is_switchable_experts(layer) and not compiled.fullmatch(name):
                for number, single in enumerate(layer.expert_names()):
                    if compiled.fullmatch(single) or single in self._layers:
                        layers[single] = layer.expert(number)
        if len(layers) > len(self._layers):
            for name in layers.keys() - self._layers.keys():
                module = name.rpartition("[")[0]
                self._configured.setdefault(name, self._configured.get(module, ""))
            self._layers = layers

    def settings(self) -> dict[str, Any]:
        """What was asked for besides the layers' formats, as plain data."""
        attention = {"attention": self.attention} if self.attention else {}
        high = self.phase.all_gather == "high"
        return {**attention, "all_gather": "high"} if high else attention

    # -- writing --------------------------------------------------------------------------------

    def set(
        self, pattern: str, format: FormatLike, *, reason: str = "", author: str = "user"
    ) -> list[str]:
        """Change the format of all layers that match, at the next step boundary.

        Args:
            pattern: a glob over the whole name, or a regular expression after "re:".
            format: a format name, a `LinearFormat`, a `DynamicScaling`, or a torchao config.
            reason: a sentence for the log.
            author: who asks, see `Change`.

        Returns:
            The names of the layers written; empty while the table is not filled yet (before
            `strategy.setup`), in which case the write waits for it.

        Raises:
            ValueError: if nothing matches, or a layer cannot run the format here.
        """
        format = linear_format(format)
        resolved = self.known.resolve(format)
        self.known.add(format)
        write = Write(pattern=pattern, format=format.name, reason=reason, author=author)
        names: list[str] = []
        if self._model is not None:
            names = self.matching(pattern)
            self.known.check(resolved, names, self._layers, self._model)
        else:
            compile_pattern(pattern)
        self._pending.append(write)
        return names

    def apply(self) -> list[Change]:
        """Carry out the pending writes. Call only between optimizer steps.

        Returns:
            The changes, in the order of the model.
        """
        if not self._pending or self._model is None or self._frozen or not self.layers:
            return []
        writes: dict[str, LinearFormat] = {}
        why: dict[str, tuple[str, str]] = {}
        for write in self._pending:
            for name in self.matching(write.pattern):
                writes[name] = self.known[write.format]
                why[name] = write.reason, write.author
        self._pending.clear()

        before = {name: layer.format for name, layer in self._layers.items()}
        regions = compiled_regions(self._model, self._layers)
        widened = self._budget.widen(regions, before, writes)
        for name, region in widened.items():
            reason = f"widened to all of {region or 'the model'}: recompile limit is near"
            why[name] = reason, "table"
        return self._write(writes, why)

    def subscribe(
        self, listener: Listener, noter: Callable[[str], object] | None = None
    ) -> Callable[[], object]:
        """Have every write told from here on, as soon as it has taken effect.

        Args:
            listener: called with the changes of one boundary, in the order of the model. What a
                replay does under `overridden` is none.
            noter: called with what else there is to know of layers, a sentence each time.

        Returns:
            What ends it.
        """
        key = object()
        self._listeners[key] = listener
        if noter is not None:
            self._noters[key] = noter
        return lambda: (self._listeners.pop(key, None), self._noters.pop(key, None))

    def _note(self, text: str) -> None:
        noters = tuple(self._noters.values()) or (log.warning,)
        for noter in noters:
            noter(text)

    def _write(
        self, formats: Mapping[str, LinearFormat], why: Mapping[str, tuple[str, str]]
    ) -> list[Change]:
        """Switch layers and tell; `why` has reason and author by layer."""
        changes = self._switch(formats, why)
        self.changes.extend(changes)
        if changes:
            for listener in tuple(self._listeners.values()):
                listener(changes)
        return changes

    def _switch(
        self, formats: Mapping[str, LinearFormat], why: Mapping[str, tuple[str, str]]
    ) -> list[Change]:
        changes: list[Change] = []
        for name, layer in self._layers.items():
            format = self.known.taken(layer, formats.get(name, layer.format))
            if format == layer.format:
                continue
            before = layer.format.name
            layer.switch(format, self.known.resolve(format).kernel)
            reason, author = why[name]
            changes.append(
                Change(layer=name, before=before, after=format.name, reason=reason, author=author)
            )
        if changes:
            self._histories.track(self._layers)
        return changes

    def follow(self, on: bool) -> None:
        """Keep an amax history of dynamic layers too, for what-if statistics of delayed scaling.

        Only our own kernel records what it casts, so torchao's layers have no history.
        """
        self._histories.follow(on, self._layers)

    def watch_casts(self, on: bool) -> None:
        """Know the amax of input and weight of dynamic layers too, of each step.

        It changes nothing else, least of all what is recorded of a layer; and costs next to
        nothing, as dynamic scaling needs the amax anyway.
        """
        self._histories.watch_casts(on, self._layers)

    @contextmanager
    def overridden(
        self,
        formats: Mapping[str, FormatLike],
        scales: StepScales | None = None,
        *,
        recording: bool = False,
    ) -> Generator[None, None, None]:
        """Other formats for a while, as a replay needs them, and no trace of it afterwards.

        Within, the table is frozen: writes wait, no change is logged, nothing is collected, and no
        history advances. It counts no compiled patterns.

        Args:
            formats: the formats of some layers, by exact name; the others keep theirs.
            scales: what layers under delayed scaling multiply with; None: with the scales of now.
            recording: whether layers go on recording, and what they record is dropped: code that
                was compiled for that serves no other replay. Else nothing is recorded.

        Raises:
            ValueError: if a layer cannot run its format here.
        """
        switches: dict[str, Resolved] = {}
        for name, format in formats.items():
            taken = self.known.taken(self._layers[name], linear_format(format))
            switches[name] = self.known.resolve(taken)
            self.known.check(switches[name], [name], self._layers, self._model)
        before = self._frozen, self.phase.evaluating
        self._frozen = self.phase.replaying = True
        history = self.scale_history
        lent = nullcontext() if scales is None else history.lent(self._layers, scales)
        try:
            with (
                lent_formats(self._layers, switches, recording=recording),
                history.untouched(),
                lent,
            ):
                yield
        finally:
            self._frozen = self.phase.replaying = before[0]
            self.phase.evaluating = before[1]

    # -- steps ----------------------------------------------------------------------------------

    def before_batch(self) -> None:
        """Before a training batch is seen: what it rounds by chance follows from the run's seed.

        torch's generator is seeded for it where a format of this run rounds by chance, and is left
        alone otherwise, and in replays, which bring the generator of their batch with them.
        """
        self._follow_gathers()
        by_chance = self._attention is not None and self._attention.by_chance
        if (by_chance or self.known.by_chance) and not self._frozen:
            self._seeds.next()

    def after_backward(self) -> None:
        """Take in what backward recorded. Needed only between the backwards of one step."""
        if not self._frozen and self.layers:
            self.scale_history.fold()

    def after_step(self) -> None:
        """After an optimizer step: update delayed scales, and let `fp8-auto` write its moves."""
        if self._frozen:
            return
        self.phase.steps += 1
        self._follow_gathers()
        for move in self._histories.step(self.layers):
            pattern = f"re:{re.escape(move.layer)}"
            self.set(pattern, move.format, reason=move.reason, author="auto")

    def _follow_gathers(self) -> None:
        """Once, by when the model is sharded: casts of gathered weights are kept with them."""
        if not self._sharding_known and self._model is not None:
            self._sharding_known = True
            keep_casts_of_gathered(self._model, self._layers.values())
            if self.phase.all_gather == "auto":
                gather_in_fp8(self._model, self._note)

    def step(self) -> list[Change]:
        """The boundary of a plain loop, after an optimizer step: `after_step`, then `apply`."""
        self.after_step()
        return self.apply()

    @property
    def scale_history(self) -> DelayedScales:
        """Histories and scales of the layers under delayed scaling."""
        return self._histories.scales

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """What must stand around each training forward of a plain loop.

        Transformer Engine's delayed scaling updates its scales where this ends, and attention has
        its format in it; otherwise it does nothing. The precision plugins open it by themselves.
        """
        with self.attention_context(), self.scale_history.context():
            yield

    def attention_context(self) -> AbstractContextManager[object]:
        """Attention multiplies in its format, in evaluation in high precision unless `fp8_eval`.

        It stands around backward too, which may run forwards again.
        """
        evaluating, model = self.phase.evaluating, self._model
        if evaluating is None:
            evaluating = model is not None and not model.training
        high = evaluating and not self.phase.fp8_eval
        return nullcontext() if self._attention is None or high else self._attention

    @property
    def attention_missed(self) -> str:
        """A line where attention was to be in a format, and was not in any forward; else ""."""
        mode = self._attention
        if mode is None or mode.met or not mode.entered:
            return ""
        return (
            f"attention was to be in {self.attention} and never was: nothing in the model calls"
            " F.scaled_dot_product_attention; what nn.MultiheadAttention calls inside of torch is"
            " out of reach"
        )

    # -- filling --------------------------------------------------------------------------------

    def fill(
        self,
        model: nn.Module,
        layers: Mapping[str, SwitchableLayer],
        formats: Mapping[str, Resolved],
    ) -> None:
        """Take over a model's layers and give them their configured formats.

        Args:
            model: the model, to find its compiled regions.
            layers: its switchable layers by name.
            formats: the configured format of each, with its kernel on this device.
        """
        raise_recompile_limit()
        self._let_go()
        self._model = model
        self._layers = dict(layers)
        self._sharding_known = False
        for each in formats.values():
            self.known.add(each.format, each)
        self._configured = {name: each.format.name for name, each in formats.items()}
        begin = {name: each.format for name, each in formats.items()}
        if not self._switch(begin, dict.fromkeys(formats, ("", "table"))):
            self._histories.track(self._layers)
        self.changes.clear()  # the beginning is no change
        self._seeds = BatchSeeds()
        if self._loaded is not None:
            self._restore(self._loaded)
        for write in self._pending:
            resolved = self.known.resolve(self.known[write.format])
            self.known.check(resolved, self.matching(write.pattern), self._layers, model)

    def meet(self, group: ProcessGroup | None = None) -> None:
        """Hear of the layers that other ranks have; before the first step, on all ranks alike.

        From here on layers agree on scales by name, so ranks may have layers of their own, as
        stages of a pipeline or experts have. Writes of formats still are made on all ranks alike.

        Args:
            group: the ranks that agree on scales; None: all.

        Raises:
            ValueError: on all ranks, where a name stands for layers of several sizes, or where
                formats cannot be decided apart.
        """
        self._histories.meet(self.layers, group, first_device(self.layers.values()))

    def _let_go(self) -> None:
        """Forget layers that another table has taken over, or that `revert` has turned back."""
        if not self.phase.left:
            return
        self.phase.left = False
        everything = self._layers
        self._layers = {
            name: layer
            for name, layer in everything.items()
            if getattr(layer, "phase", None) is self.phase
        }
        self.scale_history.release(everything.keys() - self._layers.keys())

    def forget_missing(self) -> list[str]:
        """Forget the layers that the model has no more, as where others were put in their place.

        Returns:
            Those of them that were configured to be in low precision.
        """
        if self._model is None:
            return []
        there = set(map(id, self._model.modules()))
        own = self.layers.items()
        modules = {name: getattr(x, "owner", x) for name, x in own}  # a single expert's module
        gone = [n for n, x in modules.items() if isinstance(x, nn.Module) and id(x) not in there]
        if gone:
            self.scale_history.release(gone)
        for name in gone:
            del self._layers[name]
        configured = {name: self.known[self._configured.pop(name)] for name in gone}
        return [name for name, format in configured.items() if not format.is_high_precision]

    def clear(self) -> None:
        """Forget the model, as after `revert`."""
        self.scale_history.release(self._layers.keys())
        self._model = None
        self._layers = {}

    # -- state ----------------------------------------------------------------------------------

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to keep: all in high precision as configured, without histories.

        A run goes on from the configuration alone, as from a checkpoint of the plain model.
        """
        high = all(layer.format.is_high_precision for layer in self._layers.values())
        followed = self._pending or self._loaded or len(self.scale_history)
        return high and not followed and self.formats() == self._configured

    def state_dict(self) -> dict[str, Any]:
        """The table as plain data: formats, pending writes, amax histories, seeds of batches."""
        return {
            "version": STATE_VERSION,
            "formats": self.formats(),
            "configured": dict(self._configured),
            "pending": [asdict(write) for write in self._pending],
            "seeds": self._seeds.state_dict(),
            **self._histories.state_dict(),
        }

    @reads("precision map state")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a table; before the table is filled, the state waits for it.

        A layer whose configured format differs from the one the state was saved with keeps the
        new configuration: changing the configuration on resume is how a user asks for a change.

        Raises:
            ValueError: if the state is of a version this package does not know.
        """
        current = check_version(state, STATE_VERSION, "precision map state")
        self._loaded = {"version": STATE_VERSION, **current}
        if self._model is not None:
            self._restore(self._loaded)

    @reads("precision map state")
    def _restore(self, state: Mapping[str, Any]) -> None:
        self._loaded = None
        saved: dict[str, str] = state["formats"]
        configured: dict[str, str] = state["configured"]
        formats: dict[str, LinearFormat] = {}
        changed = 0
        for name in saved.keys() - self._layers.keys():
            self.set_apart(f"re:{re.escape(name)}")
        for name in self._layers:
            if name not in saved or configured.get(name) != self._configured.get(name):
                changed += 1
                continue
            formats[name] = self.known[saved[name]]
        if changed:
            log.warning(
                "%d of %d layers keep their configured format: the checkpoint does not have them or"
                " was written with another configuration",
                changed,
                len(self._layers),
            )
        why = "restored from a checkpoint", "checkpoint"
        self._write(formats, dict.fromkeys(formats, why))
        self._histories.load_state_dict(state)
        if "seeds" in state:  # older checkpoints have none
            self._seeds.load_state_dict(state["seeds"])
        self._pending = [Write(**write) for write in state["pending"]] + self._pending
