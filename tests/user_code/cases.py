"""All cases, by name."""

from __future__ import annotations

from tests.user_code import (
    adversarial,
    averaging,
    contrastive,
    data,
    freezing,
    hooks,
    kept,
    logs,
    optimizers,
    penalties,
    reparametrised,
    stages,
    targets,
    tasks,
    unusual,
)
from tests.user_code.case import PIPELINES, Case

THEMES = (
    tasks,
    adversarial,
    contrastive,
    stages,
    targets,
    averaging,
    penalties,
    optimizers,
    freezing,
    reparametrised,
    hooks,
    kept,
    logs,
    data,
    unusual,
)
CASES: dict[str, Case] = {case.name: case for theme in THEMES for case in theme.CASES}

ON_DEMAND = {
    *("multi_task", "physics_informed", "maml", "domain_adversarial", "barlow_twins", "triplet"),
    *("byol_state_dict", "byol_lerp", "swav_frozen_prototypes", "dino", "ema_state_dict", "best_weights_kept"),
    *("spectral_penalty", "group_lasso", "fast_gradient_sign", "norms_kept", "shrink_and_perturb", "max_norm"),
    *("sign_sgd", "gradient_centralisation", "nadam_amsgrad", "accumulated_by_hand", "asgd", "clipped_by_parameter"),
    *("alternating_parts", "frozen_by_callback", "low_rank_adapters", "frozen_from_the_start"),
    *("old_weight_norm", "own_parametrization", "masked_by_hand", "weights_read_by_callback"),
    *("gradient_norms_logged", "scaled_by_first_outputs", "head_reset", "hidden_layer_supervised", "backward_hooks"),
    *("parameter_hooks", "logged_metrics_read", "progress_bar_metrics_read", "own_average_of_losses"),
    *("stops_by_logged_value", "own_sampler", "collate_fn", "two_validation_loaders", "uneven_validation"),
    *("limited_fraction", "validated_within_epoch", "loaders_of_the_module", "set_that_does_not_divide"),
    *(
        "byol_foreach",
        "moco_in_place",
        "gan",
        "ema_by_swap",
        "l1_penalty",
        "l2_penalty_transformer",
        "vae",
        "packed_lstm",
    ),
    *("adaptive_gradient_clipping", "normalised_sgd", "several_optimizers", "parameter_groups", "thawed_by_epoch"),
    *("gradients_scaled", "before_zero_grad", "optimizer_step_skips", "lr_scheduler_step", "own_gradient_clipping"),
    *("norms_in_checkpoint", "many_logs", "values_of_weights_logged", "weighted_sampler", "uneven_last_batch"),
    *(
        "several_dtypes",
        "complex_parameters",
        "lazy_layer",
        "wgan_clamped_weights",
        "dqn",
        "transformer",
        "packed_lstm",
    ),
    *("step_returns_dictionary", "unused_parts", "weight_used_twice", "hooks_of_batches", "should_stop"),
}
"""Cases whose mechanism another one tests too; with ``-m slow``, so that the others take minutes."""

# fmt: off
REFUSED_IN_PIPELINES = {
    "accumulated_by_hand", "activation_statistics", "actor_critic", "all_gather_over_the_world",
    "backward_of_some", "barlow_twins", "batch_norm", "block_by_value", "clip", "cyclegan_set_requires_grad",
    "dino", "dqn", "fake_for_both", "fast_gradient_sign", "gan", "gan_toggle_optimizer", "gan_toggled_optimizer",
    "gradient_clamped", "graphs", "groups_from_init", "history_of_block", "input_gradient_penalty", "kept_in_closure",
    "lazy_layer_without_shape", "lbfgs", "logger_in_step", "maml", "mixup", "moco_assigned", "moco_in_place",
    "model_pruning", "normalised_sgd", "own_backward", "parameter_hooks", "physics_informed", "pruned_in_training",
    "sam_by_hand", "sam_optimizer", "simclr_gathered", "simclr_own_samples", "spectral_norm", "state_carried",
    "step_returns_none", "steps_in_buffer",
    "stochastic_weight_averaging", "summed_later", "summed_loss", "swav_frozen_prototypes", "swav_step", "vq_vae",
    "weight_averaging", "weight_gradient_penalty", "wgan_clamped_weights", "wgan_gradient_penalty", "whitened",
}
# fmt: on
"""Cases that are refused under ``pp``, alone and with every other axis."""

REFUSED_IN_SOME = {
    "packed_lstm": ("p", "pg", "pi", "pt"),
    "noisy_weights": ("ps", "pt", "pi"),
    "unet_dice": ("pi",),
    "hooks_of_batches": ("ps", "pt"),
    "scaled_by_first_outputs": ("ps", "pt"),
    "ema_deepcopy": ("pt",),
    "part_by_flag": ("pt",),
    "part_in_training": ("pt",),
    "part_keeps": ("pt",),
    "part_reads_weight": ("pt",),
    "part_returns_more": ("pt",),
}
"""Cases that are refused in some of the pipelines, by those; the rest is exact."""


def expected(name: str, layout: str) -> str:
    """What has to come of a case: "exact" or "refused"."""
    if layout in PIPELINES:
        is_refused = name in REFUSED_IN_PIPELINES or layout in REFUSED_IN_SOME.get(name, ())
    else:
        is_refused = layout in CASES[name].refused
    return "refused" if is_refused else "exact"
