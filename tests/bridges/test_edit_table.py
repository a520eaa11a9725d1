"""The table of edits: what stands in it is what the edit files say."""

import copy

import pytest

from bridges.edit_table import COLUMNS, edit_table

EDIT = {
    "task": "quotes",
    "site": "1.resid_pre",
    "size": 3,
    "strengths": [0.0, 0.5, 1.0, 2.0],
    "flip_rate": [0.0, 0.2, 0.5, 0.96],
    "flip_rate_indirect": [0.0, 0.1, 0.4, 0.9],
    "control_random_node": [0.0, 0.0, 0.01, 0.02],
    "control_random_direction": [0.0, 0.0, 0.03, 0.04],
    "smallest": {"1": {"undefined": "none"}, "2": {"size": 3, "flip_rate_indirect": 0.86}},
    "share_of_all_channels": {"0.5": {"value": 0.31}, "1": {"value": 0.42}, "2": {"value": 0.53}},
    "all_channels": {"0.resid_pre": 0.61, "1.resid_pre": 0.93, "1.resid_mid": 0.93},
    "off_target_kl": 0.0123,
    "steering_form": {
        **{"direction": "corrupted", "strength": 1.5, "flip_rate": 0.87, "flip_rate_indirect": 0.83},
        **{"kl": 0.0123, "kl_near": 0.2, "share_of_tokens": 0.0125},
    },
    "prediction": {"stream": {"pearson": {"value": 0.987}}},
    "limits": {"off_target_kl": 0.02},
    "refusals": [],
    "alternatives": {
        "against_difference_of_means": {
            "everywhere": {"0.02": {"edit": 0.1, "difference_of_means": 0.2, "at_least_as_good": False}},
            "gated": {
                "0.005": {"edit": 0.5, "difference_of_means": 0.6, "at_least_as_good": False},
                "0.02": {"edit": 0.71, "difference_of_means": 0.64, "at_least_as_good": True},
                "0.1": {"edit": 0.8, "difference_of_means": 0.9, "at_least_as_good": False},
            },
        }
    },
}


def cells(edit: dict) -> dict[str, str]:
    row = edit_table([edit]).splitlines()[2]
    return dict(zip(COLUMNS, (cell.strip() for cell in row.strip("|").split("|")), strict=True))


def test_flips_and_kl_of_the_steering_are_its_own_at_one_strength() -> None:
    row = cells(EDIT)
    assert row["strength"] == "2"
    assert row["flips: indirect / total"] == "90 % / 96 %"
    assert row["share of all channels' effect"] == "53 %"  # of the patch at 2, not at 1
    assert row["all channels: best site (flips)"] == "1.resid_pre (93 %)"
    assert row["steering: prompts, strength"] == "corrupted, 1.5"
    assert row["its flips: indirect / total"] == "83 % / 87 %"
    assert row["its KL on text"] == "0.0123"
    assert row["fires on"] == "1.25 %"
    assert row["smallest at strength 1 / 2 (flips)"] == "- / 3 (86 %)"
    assert row["student predicts (r)"] == "0.987"


def test_the_edit_after_the_first_attention_stands_beside_the_other() -> None:
    name = "after the first attention: nodes, site, strength (flips)"
    assert cells(EDIT)[name] == "-"
    assert cells(EDIT | {"later": {"undefined": "no node to move"}})[name] == "-"
    later = {"site": "1.resid_mid", "size": 9, "strength": 1.0, "flip_rate_indirect": 0.84}
    assert cells(EDIT | {"later": later})[name] == "9, 1.resid_mid, 1 (84 %)"


def test_the_difference_of_means_has_both_rates_and_the_word() -> None:
    name = "flips at equal KL: edit / difference of means"
    assert cells(EDIT)[name] == "71 % / 64 %, yes"
    edit = copy.deepcopy(EDIT)
    edit["limits"]["off_target_kl"] = 0.01
    assert cells(edit)[name] == "50 % / 60 %, no"
    undecided = {"undefined": "neither flips a prompt within this KL"}
    edit["alternatives"]["against_difference_of_means"]["gated"]["0.005"]["at_least_as_good"] = undecided
    assert cells(edit)[name] == "50 % / 60 %, -"
    edit["limits"]["off_target_kl"] = 0.001
    assert cells(edit)[name] == "-"


@pytest.mark.parametrize(
    "absent", ["alternatives", "steering_form", "share_of_all_channels", "all_channels", "prediction"]
)
@pytest.mark.parametrize("how", ["absent", "undefined"])
def test_what_was_not_measured_is_a_dash(absent: str, how: str) -> None:
    edit = copy.deepcopy(EDIT)
    del edit[absent]
    if how == "undefined":
        edit[absent] = {"undefined": "why"}
    assert "-" in cells(edit).values() or any("- / -" in cell for cell in cells(edit).values())
    assert edit_table([edit]).count("\n| `quotes`") == 1
