"""What the log says of steps that never end, and of those that nobody can see into."""

__all__ = [
    "DECIDED_BESIDE_GRAPHS",
    "DECIDED_BESIDE_RESULTS",
    "OPAQUE_LINE",
    "TRIAL_ENDED_LINE",
    "beside_results_line",
    "ended_line",
    "endless_step_line",
    "retained_line",
    "stuck_line",
    "waiting_line",
]

OPAQUE_LINE = (
    "no tensor was found in what the model returned, so the end of its backward cannot be "
    "seen and whole plans are not tried in training steps; the plan is that of the layers. "
    "Return tensors, or an object that holds them as attributes"
)


DECIDED_BESIDE_GRAPHS = (
    "graphs of earlier steps are still alive after their backward (retain_graph=True, or a "
    "loss that is kept); nothing in them depends on what a layer is, so tuning goes on"
)


DECIDED_BESIDE_RESULTS = (
    "results of earlier steps are kept and may be differentiated yet; nothing in their "
    "graphs depends on what a layer is, so tuning goes on"
)


TRIAL_ENDED_LINE = (
    "training ended during the trial of whole plans; what was measured until then counts. "
    "Train longer, or lower trial_steps"
)


def ended_line(
    seen: int, wanted: int, *, passes: int, without_gradient: int, in_step: int
) -> str:
    """A run that ended in its warmup, with the likely cause."""
    if not passes:
        cause = (
            "None of its layers was called with gradients: is another object trained, "
            "such as a copy, or one that was wrapped again?"
        )
    elif without_gradient == passes:
        cause = (
            f"It was called {passes} times with gradients, but none came back: are its "
            "results detached, or is backward never called?"
        )
    elif in_step > wanted > seen:
        cause = (
            f"The last {in_step} calls are taken for micro-batches of one step: does an "
            "optimizer that holds the model's parameters step?"
        )
    else:
        cause = (
            f"Train for more than {wanted} steps, lower warmup_steps, or call "
            "auto.freeze() before the end"
        )
    return (
        f"training ended before tuning did: {seen} of {wanted} warmup steps were seen, "
        f"nothing was measured, and no layer stays converted. {cause}"
    )


def stuck_line(passes: int, steps: int, waiting: int) -> str:
    """Why tuning does not get on: no gradient comes back."""
    if waiting:
        cause = (
            f"{waiting} of their results are kept and wait for a backward: delete "
            "outputs that are never differentiated"
        )
    else:
        cause = (
            "likely they are evaluations, to be run under torch.no_grad(), or their "
            "results are detached before backward"
        )
    return (
        f"{passes} forwards with gradients in a row, but none of their gradients came "
        f"back ({steps} training steps so far). Tuning goes on until some do; {cause}. "
        "auto.freeze() decides now"
    )


def retained_line(passes: int) -> str:
    """Why tuning does not get on: graphs outlive their backward."""
    return (
        f"the graphs of {passes} passes are alive after their backward (retain_graph=True, "
        "or a loss that is kept), and activation checkpointing would recompute layers as "
        "something else than they were if they were differentiated again. Tuning goes on "
        "until they are gone: delete what holds them, such as loss, before the next forward"
    )


def beside_results_line(passes: int) -> str:
    """Why tuning does not get on: results of a step outlive it and wait for backward."""
    return (
        f"each step begins while {passes} results of earlier steps are kept and may be "
        "differentiated yet, and activation checkpointing would recompute layers as "
        "something else than they were. Tuning goes on until a step begins without: "
        "delete or detach results that are only looked at"
    )


def endless_step_line(passes: int) -> str:
    """Why tuning does not get on: nothing ends the step."""
    return (
        f"{passes} forwards with their backwards, but the model's optimizer has not "
        "stepped: all are taken for micro-batches of one step. If another optimizer "
        "trains the model, delete the one that does not. auto.freeze() decides now"
    )


def waiting_line(passes: int) -> str:
    """Why freeze() is refused between a forward and its backward."""
    return (
        f"freeze() while {passes} forward passes wait for their backward, which "
        "would recompute layers as something else than they were; call it after "
        "backward(), or delete outputs that need none"
    )
