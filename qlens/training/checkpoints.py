"""The state of a run beside weights and optimizer, in its checkpoints."""

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
from qlens.engine.verification.fingerprints import fingerprint
from qlens.losses.states import State
from qlens.registry import Variant
from qlens.training.step.inputs import MethodInputs

logger = logging.getLogger(__name__)
NAME = "qlens_state.safetensors"
START = "start."  # how the names of the tensors of a penalty begin


class RunState(TrainerCallback):
    """Starts, saves and restores old policy, averages and the start of a penalty: a resumed run equals the uninterrupted one.

    Args:
        variant: the method that is trained.
        inputs: hold the old policy and averages of the weights.
        every: optimizer steps between syncs of the old policy.

    Attributes:
        checkpoint: the folder that the run is resumed from; None for a new run.
    """

    def __init__(self, variant: Variant, inputs: MethodInputs, every: int):
        self.variant, self.inputs, self.every = variant, inputs, every
        self.checkpoint: Path | None = None
        self.start: dict[str, Tensor] = {}
        self.state_at_start: Any = None  # of what the method reads beside its arguments
        self.keeps_values = False  # whether that has changed since

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the model, or from the checkpoint."""
        model = kwargs["model"]
        self.inputs.begin(model)
        self.state_at_start, self.keeps_values = self._method_state(), False
        if self.checkpoint is not None:
            self._compare(self.checkpoint / NAME)
        if self.checkpoint is None:
            self.start = self.variant.start(model)
        elif self._needs_file():
            saved = self._read(self.checkpoint / NAME)
            self.inputs.restore(saved)
            self.start = self.variant.start(model, _part(saved, START))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move averages on; sync the old policy every ``every`` steps."""
        self.inputs.average()
        if state.global_step % self.every == 0:
            self.inputs.sync()

    def save(self, run: str, step: int) -> None:
        """Write the state into the checkpoint folder of a step, atomically; it names the method, also where there is no state."""
        folder = Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.inputs.state()
        tensors |= {START + name: value for name, value in self.start.items()}
        if not self.keeps_values and self._method_state() != self.state_at_start:
            self.keeps_values = True
            logger.warning(
                "qlens: %s: a run that is resumed from %s begins with the values you give", self._keeping, run
            )
        metadata = {"variant": self.variant.spec, "keeps": str(self.keeps_values)}
        with written(folder / NAME) as partial:
            save_file(tensors, partial, metadata=metadata)

    @property
    def _keeping(self) -> str:
        return (
            f"{self.variant.spec} keeps values from call to call (a mean, a counter, a generator of its own), and checkpoints "
            "do not hold them"
        )

    def _method_state(self) -> Any:
        """A fingerprint of what a user's method reads beside its arguments, and of its generators."""
        method = self.variant.method
        if self.variant.built_in:
            return None
        functions = [fn for fn in (method.fn, method.printed, method.on_model) if fn is not None]
        return fingerprint(functions), State(functions).generator_states()

    def _needs_file(self) -> bool:
        """Whether a checkpoint of the method needs the file."""
        return bool(self.inputs.kept) or self.variant.method.on_start is not None

    def _compare(self, path: Path) -> None:
        """Warn where a checkpoint is of another method or parameters, or lacks values that the method keeps itself."""
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
                self._keeping,
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
