"""The code around the PPO loop: resuming, SIGTERM, logs, checkpoints, rollouts kept for inspection.

A checkpoint is a folder `checkpoint-<update>` with `ppo.pt` (the trainer's `state_dict`, and the global random states
of every process) and `trainer_state.json` (the log so far, and the state of users' callbacks). It is written between
two updates and holds no rollout but the responses that were sampled ahead (`rollouts_ahead`); prompts, sampling and
minibatches follow from seed and update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate.utils import gather_object

from rlhf.config import resume_settings
from rlhf.errors import InputError
from rlhf.ppo import build
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.logged import samples
from rlhf.ppo.preflight import check_ppo
from rlhf.ppo.protocol import State, Trainer
from rlhf.ppo.rollout import ReadyRollout
from rlhf.ppo.saved import Save, saving_update, update_folder
from rlhf.run import distributed
from rlhf.run.checkpoint import full_disk_explained, mark_complete, random_state, restore_random_state, save_checkpoint
from rlhf.run.lock import training_in
from rlhf.run.owner import by_main, wait_for_all
from rlhf.run.readable import BROKEN, first_sentence
from rlhf.run.resume import Termination, resume_point, set_aside

log = logging.getLogger("rlhf")


class Run:
    """A run of a trainer, as a context manager around its loop: `while run.goes_on(): ...; run.updated(...)`.

    On entry it takes the folder, restores the checkpoint to continue from, or checks a trainer at its beginning."""

    def __init__(self, trainer: Trainer, resume_from_checkpoint: bool | str | Path | None = None):
        self.trainer = trainer
        self.asked = resume_from_checkpoint
        self.settings = {**resume_settings(trainer.args, PPOConfig), **trainer.given, **trainer.pretraining.given}
        self.folder = Path(trainer.args.output_dir)
        self.termination = Termination(trainer.accelerator)
        self._around = ExitStack()  # contexts of the whole run
        self._saving = ExitStack()  # contexts of the current update
        self._save: Save | None = None

    def __enter__(self) -> Run:
        with ExitStack() as around:
            around.enter_context(training_in(self.folder))
            around.enter_context(build.flash(self.trainer.actor_critic, self.trainer.args))
            self._restore()
            self.trainer.loop.begin(self.trainer.update_index, self.trainer.args.updates)
            self.metrics = self.trainer.loop.last_metrics()
            around.enter_context(self.termination)
            around.enter_context(full_disk_explained(self.folder))
            around.enter_context(self._saving)  # ends first, whatever it raises
            self._around = around.pop_all()
        return self

    def _restore(self) -> None:
        trainer = self.trainer
        if not self.asked and trainer.loop.begun:  # the same run, trained on by a second train()
            by_main(lambda: set_aside(self.folder, trainer.update_index))
            return
        checkpoint = resume_point(self.folder, self.asked, self.settings)
        if checkpoint is not None:
            load_checkpoint(trainer, checkpoint)
        else:
            warm, updates = trainer.args.value_warmup_updates, trainer.args.updates
            if warm >= updates:
                log.warning("value_warmup_updates=%d of updates=%d: the policy is not trained", warm, updates)
            check_ppo(trainer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._around.__exit__(kind, error, trace)
        if error is None:
            self.trainer.loop.end()

    def goes_on(self) -> bool:
        """Return whether another update follows. If its rollout is to be kept, first write the state before it."""
        if self._finished() or self.trainer.loop.should_stop:
            return False
        args, number = self.trainer.args, self.trainer.update_index + 1
        if args.save_rollouts and number % args.save_rollouts == 0:
            write = partial(self._write_marked, gathered(self.trainer))
            folder, trainer = update_folder(args.output_dir, number), self.trainer
            saving = saving_update(
                folder, trainer.accelerator, write, trainer.origin, trainer.processing_class, trainer.peft_config
            )
            self._save = self._saving.enter_context(saving)
            wait_for_all()  # the first process writes for minutes, and NCCL waits for ten
        self.trainer.loop.step_begin()
        self.trainer.clock.restart()  # the update's seconds begin here
        return True

    def updated(self, rollout: ReadyRollout, metrics: dict[str, float]) -> None:
        """Log an update; evaluate and save if that is due.

        Raises SystemExit(143) after SIGTERM, KeyboardInterrupt after SIGINT."""
        trainer, args = self.trainer, self.trainer.args
        tokens = distributed.total(trainer.accelerator, rollout.response_tokens.sum())
        self.metrics = metrics | trainer.clock.metrics(tokens)
        trainer.loop.step_end(trainer.update_index)
        evaluates = self._due(args.eval_steps) or trainer.loop.should_evaluate
        shown = samples(rollout, trainer.update_index, args.samples_logged)
        with self.kept_on_failure(lambda: trainer.loop.log(trainer.update_index, self.metrics, shown)):
            evaluated = trainer.evaluate() if evaluates and trainer.eval_prompts else {}
        self.metrics |= evaluated
        if evaluates or self._finished() or trainer.loop.should_stop:
            self.metrics |= trainer.pretraining.alignment_tax(trainer.module)
        trainer.loop.log(trainer.update_index, self.metrics, shown)
        if evaluated:
            trainer.loop.evaluated(evaluated)
        if self._save is not None:
            self._save(rollout, trainer.loop.state.log_history[-1])
            self._save = None
            self._saving.close()
            wait_for_all()
        terminated = self.termination.agreed()
        early = trainer.update_index < args.updates and (self._finished() or trainer.loop.should_stop)
        if self._due(args.save_steps) or trainer.loop.should_save or early or terminated:
            self.save_checkpoint()
        self.termination.leave()

    @contextmanager
    def kept_on_failure(self, tell: Callable[[], None] | None = None) -> Iterator[None]:
        """Write a checkpoint before an error of a reward function inside ends the run, so no update is lost.

        None is written of weights that are no numbers, with which sampling fails. tell: is called first, and logs an
        update that is done."""
        try:
            yield
        except Exception:
            trainer, alone = self.trainer, self.trainer.accelerator.num_processes == 1
            trained = (p for p in trainer.actor_critic.parameters() if p.requires_grad)
            if trainer.args.save_steps and trainer.update_index and alone and all(p.isfinite().all() for p in trained):
                if tell is not None:
                    tell()
                self.settings.pop("reward_funcs", None)  # a resumed run may have mended them
                self.save_checkpoint()
            raise

    def save_checkpoint(self) -> None:
        """Write `checkpoint-<update>`; called by every process."""
        trainer = self.trainer
        write = partial(write_state, trainer, gathered(trainer))
        given = (self.folder, trainer.update_index, write, self.settings, trainer.args.save_total_limit)
        by_main(lambda: save_checkpoint(*given))
        trainer.loop.saved()

    def _write_marked(self, state: Saved, folder: Path) -> None:
        write_state(self.trainer, state, folder)
        mark_complete(folder, self.settings)

    def _finished(self) -> bool:
        limit = self.trainer.args.stop_kl_nats
        early = limit is not None and self.metrics.get("kl_nats", 0.0) > limit
        return early or self.trainer.update_index >= self.trainer.args.updates

    def _due(self, every: int) -> bool:
        return every > 0 and (self.trainer.update_index % every == 0 or self._finished())


class Saved(State):
    """The content of a checkpoint's `ppo.pt`."""

    random: list[Any]
    """Every process's global random states, for reward functions that draw from them."""


def gathered(trainer: Trainer) -> Saved:
    """Gather the content of a checkpoint from all processes; a collective."""
    return {**trainer.state_dict(), "random": gather_object([random_state()])}


def write_state(trainer: Trainer, state: Saved, folder: Path) -> None:
    """Write a checkpoint's two files into a folder."""
    torch.save(state, folder / "ppo.pt")
    trainer.loop.save_state(folder / "trainer_state.json")


def load_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Restore a trainer from a checkpoint. Raises InputError if the folder is not one of a PPO run on these models."""
    if not (folder / "ppo.pt").is_file():
        raise InputError(f"{folder}: no ppo.pt; resume from a checkpoint-<update> folder of a PPO run")
    processes, now = 0, trainer.accelerator.num_processes
    try:
        cut = distributed.is_sharded(trainer.module)  # then every process reads its parts only
        state = torch.load(folder / "ppo.pt", map_location="cpu", weights_only=True, mmap=cut)
        trainer.load_state_dict(state)
        trainer.loop.load_state(folder / "trainer_state.json")
        processes = len(state["random"])
        if processes == now:
            restore_random_state(state["random"][trainer.accelerator.process_index])
    except InputError:
        raise
    except BROKEN as error:
        raise InputError(f"{folder}: cut short or of another model ({first_sentence(error)})") from error
    if processes != now:
        log.warning("%s was made by %d processes, now %d: goes on, but not bit for bit", folder, processes, now)
