"""The training's figures in words."""

from typing import Any


def render_report(manifest: dict[str, Any]) -> str:
    """A few lines from a manifest: size, what training changed, how the experts share the load."""
    report = manifest["report"]
    before, start, after = report["before"], report["head_start"], report["after"]
    return "\n".join(
        (
            f"parameters        {report['parameters']:,}",
            f"trained           {report['steps']} steps, {report['trained_tokens']:,} tokens, {report['train_s']} s",
            f"held-out loss     {before['loss_nats']:.2f} random -> {start['loss_nats']:.2f} from counted pairs -> "
            f"{after['loss_nats']:.2f} nats a token "
            f"(token frequencies alone: {report['unigram_entropy_nats']:.2f})",
            f"expert load       max/mean by layer {_row(after['expert_max_over_mean'])}, "
            f"entropy {_row(after['expert_entropy_share'])} of even",
        )
    )


def _row(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
