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
from tests.user_code.case import Case

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
EXACT_IN_PIPELINES = {
    "transformer", "vae", "unet_dice", "detection", "multi_task", "domain_adversarial", "triplet", "byol_assigned",
    "byol_in_place", "byol_lerp", "byol_foreach", "byol_state_dict", "swav_step", "swav_hook",
    "swav_frozen_prototypes", "distillation", "ema_callback", "ema_by_swap", "ema_state_dict", "best_weights_kept",
    "l1_penalty", "l2_penalty", "l2_penalty_transformer", "orthogonality_penalty", "spectral_penalty", "group_lasso",
    "max_norm", "clamped_weights", "norms_kept", "weight_noise", "shrink_and_perturb", "sign_sgd", "lars", "lamb",
    "clipped_by_parameter", "adaptive_gradient_clipping", "gradient_centralisation", "lookahead", "muon", "adafactor",
    "rprop", "asgd", "nadam_amsgrad", "parameter_groups", "frozen_in_step", "alternating_parts", "thawed_by_epoch",
    "frozen_from_the_start", "frozen_by_callback", "low_rank_adapters", "weight_norm", "old_weight_norm",
    "own_parametrization", "pruned", "pruned_in_training", "masked_by_hand", "gradients_scaled",
    "gradients_seen_accumulating", "gradient_noise", "gradients_centred", "gradient_norms_logged", "before_zero_grad",
    "optimizer_step_skips", "weight_norms_logged", "weights_read_by_callback", "initialised_in_on_fit_start",
    "scaled_by_first_outputs", "head_reset", "lr_scheduler_step", "own_gradient_clipping", "norms_in_checkpoint",
    "backward_hooks", "optimizer_from_init", "list_from_setup", "noisy_weights", "part_by_flag", "part_in_training",
    "part_keeps", "part_reads_weight", "callback_metrics_read", "callback_metrics_read_sync_dist",
    "logged_metrics_read", "progress_bar_metrics_read", "many_logs", "own_average_of_losses", "outputs_collected",
    "outputs_gathered", "tabular_auroc", "stops_by_logged_value", "shuffle_with_generator", "weighted_sampler",
    "own_sampler", "batch_sampler", "collate_fn", "uneven_last_batch", "drop_last", "set_that_does_not_divide",
    "iterable", "combined_loaders", "two_validation_loaders", "uneven_validation", "limited_batches",
    "limited_fraction", "validated_within_epoch", "loaders_of_the_module", "should_stop_on_one_rank", "should_stop",
    "complex_parameters", "several_dtypes", "lazy_layer", "step_returns_dictionary", "unused_parts",
    "weight_used_twice", "weights_written_in_validation", "hooks_of_batches", "part_returns_more",
}
# fmt: on
"""Cases that give one process's numbers under ``pp`` too, alone and with ``dp_replicate``. Of the others not all are
refused in a sentence yet; beside ``tp`` and ``dp_shard``, code that reads whole parameters is not right yet."""
