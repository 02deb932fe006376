from __future__ import annotations

from train_head.sweep import plan, table


def test_the_product_of_what_varies() -> None:
    runs = plan("demo", ["train.learning_rate=1e-4,5e-5", "device=cpu", "train.decay_steps=[3,4]", "seed=0,1"])
    assert [run.name for run in runs] == [
        f"demo-train.learning_rate={rate}-seed={seed}" for rate in ("1e-4", "5e-5") for seed in (0, 1)
    ]
    assert runs[2].overrides == ("device=cpu", "train.decay_steps=[3,4]", "train.learning_rate=5e-5", "seed=0")
    assert [run.variant for run in runs] == ["train.learning_rate=1e-4"] * 2 + ["train.learning_rate=5e-5"] * 2
    assert [run.name for run in plan("demo", ["device=cpu"])] == ["demo"]


def test_mean_and_sample_deviation_over_seeds() -> None:
    rows = [dict.fromkeys(("AP", "AP50", "AP75", "AR1", "AR10"), value) for value in (0.1, 0.2, 0.3, None)]
    lines = table(["a", "a", "a", "b"], rows).splitlines()
    assert lines[1].split()[:5] == ["a", "3", "20.0", "±", "10.0"]
    assert lines[2].split() == ["b", "1", *["-"] * 5]
