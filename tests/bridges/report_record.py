"""A report's record as the recipes write it, small and complete: no value is missing, none is undefined."""

from typing import Any


def small_graph() -> dict[str, Any]:
    """Two layers: attention writes channel 7, which both the MLP and the next layer read."""
    edges = [
        ["0.attn.act_in:12", "0.attn.q:1", 0.52],
        ["0.attn.act_in:12", "0.attn.k:4", -0.31],
        ["0.attn.act_in:5", "0.attn.v:3", 0.11],
        ["0.attn.v:3", "0.attn.resid_delta:7", 0.9],
        ["0.mlp.act_in:7", "0.mlp.post_act:40", -1.25],
        ["0.mlp.post_act:40", "0.mlp.resid_delta:12", 0.4],
        ["1.attn.act_in:12", "1.attn.v:2", 0.2],
        ["1.attn.act_in:7", "1.attn.v:2", 0.05],
    ]
    nodes = sorted({end for edge in edges for end in edge[:2]})
    return {"nodes": nodes, "edges": edges}


def circuit() -> dict[str, Any]:
    graph = small_graph()
    return {
        **{"nodes": len(graph["nodes"]), "edges": len(graph["edges"])},
        **{"nodes_total": 4096, "edges_total": 123456, "loss": 0.1432, "accuracy": 0.956},
        **{"accuracy_interval": [0.923, 0.977], "sufficiency": 0.9312, "necessity": 0.8841},
        **{
            "accuracy_without": 0.5123,
            "accuracy_without_calibrated": 0.5391,
            "loss_without": 0.7012,
            "student_loss": 0.0921,
        },
        **{"student_accuracy": 0.9789, "against_student": {"sign": {"value": 0.9456}}, "num_prompts": 256},
        **{"target_loss": 0.15, "target": "answer", "ablation": "mean"},
        "random_circuits": {
            **{"count": 20, "accuracy_mean": 0.5034, "accuracy_max": 0.5567},
            **{"loss_min": 0.6931, "accuracy_without_mean": 0.9721},
        },
        "ablations": {
            kind: {
                "sufficiency": mark(0.93),
                "necessity": mark(0.88),
                **{"accuracy": 0.95, "accuracy_without": 0.51, "floor_accuracy": 0.5},
            }
            for kind in ("mean", "resample")
        },
        "adversary": {"curve": [{"most": most, "loss": 0.25} for most in (1, 10, 100, "any")]},
        "controls": {
            "seeds": {
                **{"count": 3, "sizes": [12, 13, 11], "recurrence": 0.75, "jaccard": 0.6},
                **{"core": ["0.attn.act_in:12"], "noise": ["0.attn.v:3"]},
            },
            "nonsense": [{"kind": "prompt", "loss": 0.69}],
            "shuffled": {"loss": 0.7},
            "other_tasks": {
                "other": {
                    **{"student_accuracy": 0.97, "accuracy_alone": 0.5, "accuracy_without": 0.9},
                    **{"accuracy_without_calibrated": 0.91, "num_prompts": 64},
                }
            },
        },
        "cards": [
            {
                **{"node": "0.attn.act_in:12", "labels": ["high after an opening bracket"]},
                "effect": {"total": mark(2.5), "direct": mark(0.5)},
                "contexts": [{"activation": 3.5, "before": "x = ", "token": "[", "after": "1"}],
            }
        ],
        "templates": [{"template": 0, "n": 64, "student_accuracy": 0.98, "accuracy": 0.95, "loss": 0.14}],
        "size_curve": {
            "cuts": [{"nodes": 4, "edges": 3, "loss": 0.6}, {"nodes": 12, "edges": 8, "loss": 0.14}],
            "targets": [{"target_loss": 0.15, "nodes": 12, "edges": 8}],
        },
        "verdict": {
            "word": "partly",
            "reasons": [
                {
                    "name": "held-out loss",
                    "value": 0.1432,
                    "relation": "at most",
                    "limit": 0.2,
                    "passed": True,
                },
                {
                    **{"name": "seeds searched", "value": 1.0, "relation": "at least"},
                    **{"limit": 10.0, "passed": False},
                },
            ],
        },
        "example": {
            "clean": "def f(x):\n    return [1, 2",
            "corrupted": "def f(x):\n    return [[1, 2",
            "answer": "]\n",
            "distractor": "]]\n",
        },
        "graph": graph,
    }


def mark(value: float) -> dict[str, Any]:
    """A value with its interval."""
    return {
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "method": "BCa",
        "clusters": 12,
        "n": 256,
    }


def steering() -> dict[str, Any]:
    text = {"kl": 0.011, "kl_near": 0.21, "loss_change": 0.003, "share_of_tokens": 0.04}
    return {"strength": 1.0, "flip_rate": 0.9, "flip_rate_indirect": 0.8, "text": text}


def transfer() -> dict[str, Any]:
    return {
        "monitor": {
            **{"site": "1.resid_mid", "share_of_text_tokens_with_alarm": 0.02},
            "prompts": {
                name: {"auroc": 0.99, "logistic_probe": {"auroc": 0.98}} for name in ("held_out", "shifted")
            },
        },
        "image": {
            "accuracy": 0.55,
            "random_subspaces": {"accuracy_mean": 0.9, "p": 0.02, "selectivity_p": 0.04},
        },
    }


def desk() -> dict[str, Any]:
    """Two nodes, two settings, two prompts."""
    return {
        "prompts": [
            {"text": "def f(x):\n    return [1", "answer": "]", "distractor": ")"},
            {"text": "def f(x):\n    return (1", "answer": ")", "distractor": "]"},
        ],
        "tokens": ["]", ")", "\n"],
        "settings": [
            {"target": "the counterfactual's value", "strength": 1.0},
            {"target": "its mean over text", "strength": 1.0},
        ],
        "nodes": ["0.attn.act_in:12", "0.mlp.act_in:7"],
        "nodes_total": 12,
        "left_out": [],
        "unedited": {
            **{"student": [2.5, 3.25], "dense": [2.0, 4.0]},
            **{"student_top": [0, 1], "dense_top": [0, 1]},
        },
        "student": [[[-1.5, -2.0], [1.0, 1.5]], [[2.25, 3.0], [2.5, 3.25]]],
        "dense": [[[-1.0, 0.5], [1.25, 2.0]], [[2.0, 3.75], [2.0, 4.0]]],
        "student_top": [[[1, 0], [0, 1]], [[0, 1], [0, 1]]],
        "dense_top": [[[1, 2], [0, 1]], [[0, 1], [0, 1]]],
    }


def comparison(*tasks: str) -> dict[str, Any]:
    """Two models on text, four on every task."""
    overall = {
        **{"tokens": 1000, "loss": mark(2.1), "loss_difference": mark(0.4), "kl": mark(0.41)},
        "loss_correlation": {"pearson": mark(0.9), "spearman": 0.88},
        **{"top1_agreement": mark(0.7), "top1_accuracy": mark(0.5), "calibration_error": 0.02},
    }
    by_class = {"keywords": {key: overall[key] for key in ("tokens", "loss", "loss_difference", "kl")}}
    by_class["keywords"]["top1_agreement"] = mark(0.8)
    top = [{"token": " in", "probability": 0.6}, {"token": ":", "probability": 0.2}]
    worst = {
        **{"before": "for x", "token": " in", "after": " y:", "class": "keywords", "kl": 3.5},
        **{"loss": {"dense": 0.1, "student": 5.5}, "top": {"dense": top, "student": top}},
    }
    against = {"loss_difference": mark(0.3), "accuracy_difference": mark(-0.1), "same_answer": mark(0.8)}
    model = {"accuracy": mark(0.8), "loss": mark(0.3), "against": {"dense": against, "student": against}}
    task = {
        "counts": {"planned": 64, "run": 64, "scored": 64, "excluded": 0, "reasons": []},
        "models": {
            **{"dense": model, "student": model, "circuit": model},
            "edited": model | {"flips": mark(0.7)},
        },
        "worst": [
            {
                **{"prompt": "x = [1", "answer": "]", "distractor": ")"},
                "logit_difference": {"dense": 5.5, "student": -1.5},
            }
        ],
    }
    return {
        "text": {
            "counts": {
                **{"planned": 1024, "run": 1024, "scored": 1000, "excluded": 24},
                "reasons": [{"reason": "the first token of a block", "count": 24}],
            },
            "classes": ["keywords"],
            "models": {name: {"overall": overall, "by_class": by_class} for name in ("dense", "student")},
            "scatter": {"shown": 2, "of": 1000, "points": [[0.5, 1.5, 0], [2.5, 2.25, 0]]},
            "worst": {"by_kl": [worst], "by_loss_difference": [worst]},
        },
        "tasks": {name: task for name in tasks},
    }


def edit() -> dict[str, Any]:
    return {
        **{"site": "1.resid_pre", "nodes": ["1.attn.act_in:12", "1.attn.act_in:7"], "size": 2},
        "strengths": [0, 0.5, 1.0, 1.5, 2.0],
        "flip_rate": [0.0, 0.219, 0.648, 0.871, 0.992],
        "flip_rate_indirect": [0.0, 0.188, 0.559, 0.742, 0.742],
        "control_random_node": [0.0, 0.004, 0.012, 0.016, 0.023],
        "control_random_direction": [0.0, 0.008, 0.027, 0.031, 0.039],
        "off_target_kl": 0.0102,
        **{"num_prompts": 256, "delta_norm_ratio": 0.317, "limit": "held-out templates only"},
        **{"refusals": [], "limits": {"off_target_kl": 0.02}, "num_right_before": 250},
        "log_odds": {"slope_total": mark(-3.2), "slope_indirect": mark(-2.9)},
        "steering": {"clean": {"gated": {"strengths": [steering()]}}},
        "smallest": {
            "1": {
                **{"size": 2, "site": "1.resid_pre", "in_circuit": 1},
                **{"flip_rate_indirect": 0.559, "share_of_everything": 0.81},
            }
        },
        "alternatives": {"methods": {"edit": {"gated": {"flip_at": {"0.02": 0.61}}}}},
        "prediction": {
            "tap": {"pearson": mark(0.7)},
            "stream": {"pearson": mark(0.95)},
            "points": [
                {
                    **{"nodes": ["1.attn.act_in:12"], "site": "1.resid_pre", "strength": 1.0},
                    **{"tap": -1.5, "stream": -2.5, "measured": -2.75},
                }
            ],
        },
    }


def record(*tasks: str) -> dict[str, Any]:
    """A complete record, as a recipe would write it."""
    tasks = tasks or ("quotes", "brackets")
    behaviour = {task: {"accuracy": 0.9812, "loss": 0.0812, "num_prompts": 128} for task in tasks}
    sites = ("0.resid_pre", "0.resid_mid", "1.resid_pre")
    bridge = {"nmse_encode": 0.0312, "nmse_decode": 0.0277}
    bridge |= {"kl_dense_to_sparse": 0.0411, "kl_sparse_to_dense": 0.0388}
    return {
        **{"schema_version": 1, "status": "complete", "run": "runs/quickstart"},
        "dense": {"name": "dense-python-4l", "sha256": "ef" * 32, "ce": 1.8765, "tasks": behaviour},
        "student": {
            **{"ce": 2.0123, "kl_dense": 0.1534, "init_kl_dense": 3.217, "density": 0.125},
            **{"nonzeros": 131072, "parameters": 1048576, "activation_frac": 0.25},
            "matrices": {"blocks.0.attn.q": {"shape": [256, 256], "nonzeros": 8192, "k": 32}},
            "tasks": {task: {"accuracy": 0.9812, "loss": 0.0812} for task in tasks},
        },
        "bridges": {site: dict(bridge) for site in sites},
        "circuits": {task: circuit() for task in tasks},
        "edits": {task: edit() for task in tasks},
        "desk": {task: desk() for task in tasks},
        "compare": comparison(*tasks),
        "transfer": {task: transfer() for task in tasks},
        "accounting": [
            {
                **{"what": "prompts", "planned": 256, "run": 256, "scored": 239, "excluded": 17},
                "why": "two tokens long",
            }
        ],
        "exclusions": [{"what": "17 prompts", "why": "the answer is two tokens long"}],
        "criteria": [
            {"claim": "faithful", "threshold": "KL < 0.2", "measured": "0.1534", "met": True},
            {"claim": "small", "threshold": "nodes <= 8", "measured": "12", "met": False},
        ],
        "method": {
            **{"config": "seed: 0\nsteps: 100\n", "replay": "python recipes/train.py\n"},
            "tolerance": {"prompts": 1, "nats": 0.001},
        },
        "provenance": {
            "date": "2026-01-02T03:04:05Z",
            "environment": {"python": "3.11.7", "versions": {"torch": "2.13.0"}},
            "inputs": {"dense/model.safetensors": "ab" * 32},
            "artifacts": {"student/model.safetensors": "cd" * 32},
            "recipes": {"train": {"seed": 0}},
        },
    }
