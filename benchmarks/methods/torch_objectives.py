"""The objectives of ``objectives`` by TRL and by Liger, on a CPU.

``LOADERS[library](batch)`` gives losses of ``(hidden, kernel[V, D], labels)`` by the names of the
objectives. TRL's are those of its trainers: what a trainer computes of a batch, with a stand-in for
the trainer's settings and for the model in front of the output layer. Liger's are its chunked
losses, without ``torch.compile``.
"""

import inspect
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from benchmarks.harness.environment import environment
from benchmarks.methods.objectives import BETA, BETA_DPO, BETA_JSD, HIGH, HIGH_DAPO, LOW, Batch

Losses = dict[str, Callable[..., Any]]


def tensors(batch: Batch) -> tuple[Any, Batch]:
    """torch, and the batch as its tensors; kernels are [V, D]."""
    torch = import_module("torch")
    torch.set_num_threads(environment()["cores"])
    arrays = batch._replace(kernel=batch.kernel.T, ref_kernel=batch.ref_kernel.T)
    x = Batch(*(torch.from_dlpack(jnp.array(a, copy=True)) for a in arrays))
    return torch, x._replace(labels=x.labels.long())


def liger(batch: Batch) -> Losses:
    chunked = import_module("liger_kernel.chunked_loss")
    _, x = tensors(batch)
    ids, mask = x.labels.clamp(min=0), (x.labels >= 0).float()
    plain = {"compiled": False, "epsilon_low": LOW}
    of_grpo = chunked.LigerFusedLinearGRPOLoss(
        beta=BETA, epsilon_high=HIGH, loss_type="grpo", **plain
    )
    of_dapo = chunked.LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_high=HIGH_DAPO, loss_type="dapo", use_ref_model=False, **plain
    )
    of_jsd = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA_JSD, compiled=False
    )
    of_dpo = chunked.LigerFusedLinearDPOLoss(beta=BETA_DPO, compute_nll_loss=False, compiled=False)
    own = {"old_per_token_logps": x.before}
    reference = {"ref_input": x.ref_hidden, "ref_weight": x.ref_kernel}

    def jsd(hidden, kernel, labels):
        flat = hidden.flatten(0, 1), kernel, x.ref_hidden.flatten(0, 1), x.ref_kernel
        return of_jsd(*flat, labels.flatten())

    return {
        "GRPO": lambda h, k, _: of_grpo(h, k, ids, mask, x.advantage, **own, **reference)[0],
        "DAPO": lambda h, k, _: of_dapo(h, k, ids, mask, x.advantage, **own)[0],
        "JSD": jsd,
        "DPO": lambda h, k, labels: of_dpo(k, h, labels, **reference)[0],
    }


def _model(add_fused_lm_head: Callable, hidden: Any, kernel: Any, outputs: tuple[str, ...]) -> Any:
    """A model for TRL: its hidden states are given, and TRL's own output layer follows."""

    class Model:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

        def forward(self):
            raise NotImplementedError

        def base_model(self, *args, **kwargs):
            return SimpleNamespace(last_hidden_state=hidden)

        def get_output_embeddings(self):
            return SimpleNamespace(weight=kernel, bias=None)

        def __call__(self, *args, **kwargs):
            return self.forward(*args, **kwargs)

    model = Model()
    add_fused_lm_head(model, outputs=outputs)
    return model


def _stand_in(torch: Any, **settings: Any) -> SimpleNamespace:
    """What TRL's trainers ask of themselves in a step on one device."""
    alone = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        autocast=nullcontext,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    metrics = defaultdict(lambda: defaultdict(list))
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    common = {"accelerator": alone, "_metrics": metrics, "model": model, "aux_loss_enabled": False}
    return SimpleNamespace(**common, **settings)


def _grpo_settings(beta: float, high: float, loss_type: str) -> dict[str, Any]:
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    return {
        "args": args,
        "beta": beta,
        "epsilon_low": LOW,
        "epsilon_high": high,
        "loss_type": loss_type,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
    }


def _dpo_settings(ref_model: Any) -> dict[str, Any]:
    return {
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "beta": BETA_DPO,
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "ref_model": ref_model,
        "f_divergence_type": "reverse_kl",
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "use_weighting": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }


def trl(batch: Batch) -> Losses:
    torch, x = tensors(batch)
    head_of = import_module("trl.trainer.utils").add_fused_lm_head
    trainer = import_module("trl.trainer.grpo_trainer").GRPOTrainer
    dpo_trainer = import_module("trl.trainer.dpo_trainer").DPOTrainer
    divergence = import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    # A prompt of one token stands before each answer: the token that predicts the answer's first.
    mask = (x.labels >= 0).long()
    ids = torch.nn.functional.pad(x.labels.clamp(min=0), (1, 0))
    ones = torch.ones_like(ids[:, :1])
    whole = lambda hidden: torch.nn.functional.pad(hidden, (0, 0, 0, 1))  # noqa: E731
    model_of = lambda h, k, outputs: _model(head_of, whole(h), k, outputs)  # noqa: E731
    with_mask = {"input_ids": ids, "attention_mask": torch.cat([ones, mask], 1)}
    log_probs = inspect.unwrap(trainer._get_per_token_logps_and_entropies)

    def policy(beta, high, loss_type, hidden, kernel, _):
        this = _stand_in(torch, **_grpo_settings(beta, high, loss_type))
        this._get_per_token_logps_and_entropies = partial(log_probs, this)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ones,
            "completion_ids": ids[:, 1:],
            "completion_mask": mask,
            "advantages": x.advantage,
            "old_per_token_logps": x.before,
            "num_items_in_batch": mask.sum(),
        }
        if beta:
            reference = model_of(x.ref_hidden, x.ref_kernel, ("log_probs",))
            with torch.no_grad():
                found = log_probs(this, reference, *with_mask.values(), mask.shape[1])
            inputs["ref_per_token_logps"] = found[0]
        model = model_of(hidden, kernel, ("log_probs", "entropy"))
        return trainer._compute_loss(this, model, inputs)

    def entropy(hidden, kernel, labels):
        labels = torch.nn.functional.pad(labels, (1, 0), value=-100)
        outputs = "log_probs", "entropy"
        found = model_of(hidden, kernel, outputs)(labels=labels, fused_lm_head=True)
        return found.entropy.sum() / mask.sum()

    def dpo(hidden, kernel, _):
        reference = model_of(x.ref_hidden, x.ref_kernel, ("log_probs",))
        this = _stand_in(torch, **_dpo_settings(reference))
        outputs = "log_probs", "entropy", "mean_logits", "is_top1"
        completion = {"completion_mask": torch.cat([0 * ones, mask], 1)}
        model = model_of(hidden, kernel, outputs)
        return dpo_trainer._compute_loss(this, model, with_mask | completion, False)

    return {
        "GRPO": partial(policy, BETA, HIGH, "grpo"),
        "DAPO": partial(policy, 0.0, HIGH_DAPO, "dapo"),
        "entropy": entropy,
        "JSD": lambda h, k, _: divergence(h, x.ref_hidden, k, x.ref_kernel, mask, BETA_JSD)[0],
        "DPO": dpo,
    }


def trl_of_logits(batch: Batch) -> Losses:
    """TRL's functions of materialised logits, where it has a public one."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    _, x = tensors(batch)
    utils = import_module("trl.trainer.utils")
    gkd = import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    mask = x.labels >= 0

    def jsd(hidden, kernel, labels):
        teacher = x.ref_hidden @ x.ref_kernel.T
        return gkd.generalized_jsd_loss(hidden @ kernel.T, teacher, labels=labels, beta=BETA_JSD)

    def entropy(hidden, kernel, _):
        return utils.entropy_from_logits(hidden @ kernel.T)[mask].mean()

    return {"entropy": entropy, "JSD": jsd}


LOADERS: dict[str, Callable[[Batch], Losses]] = {
    "TRL": trl,
    "TRL of logits": trl_of_logits,
    "Liger": liger,
}
