"""The training loop, and how a run ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from llada import exits
from llada.config import RunConfig
from llada.training.hooks import Hook
from llada.training.reporting.reporter import log_lifecycle
from llada.training.run import Run
from llada.training.signals import StopRequest


def train(
    config: RunConfig,
    stop: StopRequest,
    allow_changed: bool = False,
    rewind: int | None = None,
    hooks: Sequence[Hook] = (),
) -> int:
    """Run `config` from its latest checkpoint, or from the start, to `train.steps`.

    Args:
        config: the run.
        stop: asked to stop when true; read after every step.
        allow_changed: resume although settings, data or versions changed; recorded in the lineage.
        rewind: go back to the checkpoint after this many steps; recorded in the lineage.
        hooks: called at named moments of the run, see `llada.training.hooks`.

    Returns:
        The exit code: FINISHED, or RESTART after a signal.

    Raises:
        UserError: the config, the data or the checkpoint cannot be used.
        RunError: the run failed.
        TryAgain: asked to stop while another process held the run folder.
    """
    run = Run(config, stop, allow_changed, rewind, hooks)
    try:
        log_lifecycle(run.reporter, "started")
        code = _loop(run, stop)
        outcome = "stopped"
        if code == exits.FINISHED:
            outcome = "finished"
        log_lifecycle(run.reporter, outcome)
    except BaseException as error:
        # What fails here must not hide the first error, which the user has to see.
        with suppress(Exception):
            if isinstance(error, Exception):
                log_lifecycle(run.reporter, "failed", reason=str(error), failure=True)
        with suppress(Exception):
            run.close()
        raise
    run.close()
    return code


def _loop(run: Run, stop: StopRequest) -> int:
    config = run.config
    run.hooks.on_start(run.start_step)
    if run.starts_from_weights:
        # The baseline that the training is compared with.
        run.validate(0)
    for step, plan, batches in run.batches():
        result = run.engine.train_step(
            batches, run.schedule.learning_rate(step), run.guard.limits(step)
        )
        run.record(step, plan, result)
        done = step + 1
        last = done == config.train.steps
        # All ranks have to agree on both, in one exchange: whether to stop, and whether a
        # checkpoint is still being written somewhere.
        stopping, writing = run.engine.any_of(bool(stop), run.checkpoints.is_writing())
        if not writing:  # so this does not wait
            run.finish_save()
        if done % config.validation.every == 0 or last:
            run.validate(done)
        if done % config.checkpoint.every == 0 or last or stopping:
            run.save(done, wait=last or stopping)
        if stopping and not last:
            run.reporter.log_event("signal", step=done, signal=stop.signal)
            run.reporter.print_main(
                f"{stop.signal or 'another rank'}: stopped after step {done} with a checkpoint; run"
                " the same command again to continue"
            )
            return exits.RESTART
    run.finish()
    return exits.FINISHED
