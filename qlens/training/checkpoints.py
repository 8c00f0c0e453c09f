"""Checkpoints: what a run needs beside weights and optimizer, so that a resumed run is the uninterrupted one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlens.core.errors import InputError
from qlens.core.files import written
from qlens.engine.verification.marks import marks
from qlens.losses.states import State
from qlens.registry import Variant
from qlens.training.inputs import Feed

logger = logging.getLogger(__name__)
NAME = "qlens_state.safetensors"
OLD, START = "old.", "start."  # how the names of their tensors begin


class RunState(TrainerCallback):
    """The old policy and the start of the penalty: begun with a run, saved in its checkpoints, restored from them.

    Args:
        variant: the method that is trained.
        feed: holds the old policy.
        every: optimizer steps between refreshes of the old policy.

    Attributes:
        checkpoint: the folder that the run is resumed from; None for a new run.
    """

    def __init__(self, variant: Variant, feed: Feed, every: int):
        self.variant, self.feed, self.every = variant, feed, every
        self.checkpoint: Path | None = None
        self.start: dict[str, Tensor] = {}
        self.read: Any = None  # what the method read beside its arguments when the run began
        self.keeps = False  # whether that has changed since, so that the method keeps values from call to call

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run at the model as it is, or where the checkpoint left it."""
        model = kwargs["model"]
        self.feed.begin(model)
        self.read, self.keeps = self._readings(), False
        if self.checkpoint is not None:
            self._compare(self.checkpoint / NAME)
        if self.checkpoint is None:
            self.start = self.variant.start(model)
        elif self._needed():
            saved = self._read(self.checkpoint / NAME)
            self.feed.restore(_part(saved, OLD))
            self.start = self.variant.start(model, _part(saved, START))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh the old policy, every so many steps."""
        if state.global_step % self.every == 0:
            self.feed.refresh()

    def save(self, run: str, step: int) -> None:
        """Write the file into the checkpoint folder of a step, whole or not at all; it names the method, whatever that needs."""
        folder = Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {OLD + name: value for name, value in self.feed.state().items()}
        tensors |= {START + name: value for name, value in self.start.items()}
        if not self.keeps and self._readings() != self.read:
            self.keeps = True
            logger.warning("qlens: %s: a run that is resumed from %s begins with the values you give", self._kept, run)
        metadata = {"variant": self.variant.spec, "keeps": str(self.keeps)}
        with written(folder / NAME) as partial:
            save_file(tensors, partial, metadata=metadata)

    @property
    def _kept(self) -> str:
        return (
            f"{self.variant.spec} keeps values from call to call (a mean, a counter, a generator of its own), and checkpoints "
            "do not hold them"
        )

    def _readings(self) -> Any:
        """What a method of a user's own reads beside its arguments, and the states of its generators, as they are now."""
        method = self.variant.method
        if self.variant.built_in:
            return None
        functions = [fn for fn in (method.fn, method.printed, method.on_model) if fn is not None]
        return marks(functions), State(functions).drawn()

    def _needed(self) -> bool:
        """Whether a checkpoint of the method needs the file."""
        return "old" in self.variant.needs or self.variant.method.on_start is not None

    def _compare(self, path: Path) -> None:
        """Warn where a checkpoint was trained by another method, by other parameters, or lacks what the method keeps itself."""
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        trained = metadata.get("variant", self.variant.spec)
        if trained == self.variant.spec and metadata.get("keeps") == "True":
            logger.warning(
                "qlens: %s: this run, resumed from %s, begins with those that it has now, and is no uninterrupted one unless you "
                "have given it those of that step",
                self._kept,
                path.parent,
            )
        if trained != self.variant.spec:
            logger.warning(
                "the checkpoint %s was trained by %s and goes on as %s, from the other's optimizer state: to begin a new run "
                "from its weights, load the model from that folder and leave resume_from_checkpoint out",
                path.parent,
                trained,
                self.variant.spec,
            )

    def _read(self, path: Path) -> dict[str, Tensor]:
        """The file's tensors by name.

        Raises:
            InputError: it is not there, has none, or is damaged.
        """
        try:
            saved = load_file(path) if path.is_file() else {}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        if not saved:
            lacks = "has no state of such a run" if path.is_file() else "is not there"
            raise InputError(
                f"{path} {lacks}, so that {self.variant.spec} cannot be resumed: a checkpoint saved without it "
                "(save_only_model=True, another method, an older qlens) can only begin a new run from its weights"
            )
        return saved


def _part(saved: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
