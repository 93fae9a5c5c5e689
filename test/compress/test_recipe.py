"""Recipes say what they mean, and mistakes in them are found before any work starts."""

from __future__ import annotations

import pytest

from vla_edge.compress.plan import grouped_by_stage, matches, plan_layers
from vla_edge.compress.recipe import RecipeError, load_recipe, parse_recipe, recipe_directory
from vla_edge.compress.steps import Keep, Quantize

LAYERS = ("vision.layers.0.q", "vision.layers.0.mlp.up", "vision.connector", "prefix.layers.0.q", "denoise.action_out")
SHIPPED = sorted(path.stem for path in recipe_directory().glob("*.yaml"))


def recipe(*steps, **rest):
    return parse_recipe({"steps": list(steps), **rest})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_and_say_what_they_accept(name):
    found = load_recipe(name)
    assert found.name == name and found.description
    assert found.accept.action_error_rel and found.accept.cosine


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_survives_the_manifest(name):
    found = load_recipe(name)
    assert parse_recipe(found.to_dict()) == found


def test_the_promised_recipes_are_shipped():
    assert {"fp32", "int8", "int8-dynamic", "int8-weight-only", "int4-rtn"} <= set(SHIPPED)


@pytest.mark.parametrize(
    ("plain", "wrong", "nearest"),
    [
        ({"step": []}, "step", "steps"),
        ({"steps": [{"quantise": {"targets": ["vision"]}}]}, "quantise", "quantize"),
        ({"steps": [{"quantize": {"target": ["vision"]}}]}, "target", "targets"),
        ({"steps": [{"quantize": {"targets": ["vision"], "weight": "int8"}}]}, "weight", "weights"),
        ({"steps": [{"keep": {"targets": ["vision"], "type": "float16"}}]}, "type", "dtype"),
        ({"accept": {"action_error": 0.1}}, "action_error", "action_error_rel"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(plain, wrong, nearest):
    with pytest.raises(RecipeError, match=f"unknown key '{wrong}'; did you mean '{nearest}'"):
        parse_recipe(plain)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"quantize": {"targets": ["vision"], "weights": "int3"}},
            "weights is 'int3', allowed is int8, int4, fp8, nvfp4",
        ),
        (
            {"quantize": {"targets": ["vision"], "activations": "int5"}},
            "allowed is null, int8, int8-dynamic, fp8, int4-dynamic",
        ),
        ({"quantize": {"targets": ["vision"], "weights": "int4"}}, "need a group_size"),
        ({"quantize": {"targets": ["vision"], "group_size": 0, "weights": "int4"}}, "group_size is 0"),
        ({"quantize": {"targets": ["vision"], "method": "magic"}}, "method is 'magic'"),
        ({"quantize": {"targets": ["vision"], "percentile": 12}}, "percentile is 12"),
        ({"quantize": {"targets": []}}, "must be a list of stages"),
        ({"quantize": {"targets": ["vision"], "reduce_range": True}}, "goes with int8 weights and 8-bit activations"),
        ({"quantize": {"targets": ["vision"], "reduce_range": "maybe"}}, "allowed is true, false, auto"),
        ({"quantize": {"weights": "int8"}}, "lacks targets"),
        ({"keep": {"targets": ["vision"], "dtype": "int8"}}, "dtype is 'int8'"),
        ({"keep": {"targets": ["a"]}, "quantize": {"targets": ["b"]}}, "each step has one"),
        ("quantize", "must map keys to values"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(step, message):
    with pytest.raises(RecipeError, match=message):
        recipe(step)


def test_a_limit_must_be_a_number():
    with pytest.raises(RecipeError, match="cosine is 'high'"):
        recipe(accept={"cosine": "high"})


def test_a_recipe_that_does_not_exist_names_one_that_does():
    with pytest.raises(RecipeError, match="there is no recipe 'int9'; did you mean 'int8'"):
        load_recipe("int9")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe("nowhere/int8.yaml")


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("steps: [")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "bad.yaml")


def test_targets_are_stages_paths_and_patterns():
    assert matches("vision", "vision.layers.0.q")
    assert matches("vision.layers", "vision.layers.0.q")
    assert matches("*.q", "vision.layers.0.q")
    assert matches("vision.layers.*.mlp", "vision.layers.0.mlp.up")
    assert not matches("vis", "vision.layers.0.q")


def test_a_target_that_matches_nothing_names_the_nearest():
    with pytest.raises(RecipeError, match="target 'vison' matches no layer; did you mean 'vision'"):
        plan_layers(recipe({"quantize": {"targets": ["vison"]}}), LAYERS)


def test_keep_makes_exceptions_to_quantize_and_the_rest_stays_in_float32():
    plan = plan_layers(
        recipe(
            {"quantize": {"targets": ["vision"], "activations": "int8"}},
            {"keep": {"targets": ["vision.connector"], "dtype": "float16"}},
        ),
        LAYERS,
    )
    assert isinstance(plan["vision.layers.0.q"], Quantize)
    assert plan["vision.connector"].dtype == "float16"
    assert isinstance(plan["denoise.action_out"], Keep) and plan["denoise.action_out"].dtype == "float32"
    assert set(grouped_by_stage(plan)["vision"]) == {"layers.0.q", "layers.0.mlp.up", "connector"}


@pytest.mark.parametrize("order", [1, -1])
def test_quantizing_only_what_is_kept_is_a_contradiction(order):
    steps = [{"quantize": {"targets": ["vision.connector"]}}, {"keep": {"targets": ["vision"]}}][::order]
    with pytest.raises(RecipeError, match="only about layers that another step keeps"):
        plan_layers(recipe(*steps), LAYERS)


def test_two_steps_for_one_layer_are_a_contradiction():
    steps = (
        {"quantize": {"targets": ["vision"]}},
        {"quantize": {"targets": ["*.q"], "weights": "int4", "group_size": 32}},
    )
    with pytest.raises(RecipeError, match="steps 1 and 2 both say what becomes of vision.layers.0.q"):
        plan_layers(recipe(*steps), LAYERS)
