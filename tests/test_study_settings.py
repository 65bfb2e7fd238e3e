import pytest

from fedunlearn.errors import UserError
from fedunlearn.schema import fields_of
from fedunlearn.study.pooled.settings import PaperSettings, load


def test_the_full_scale_is_the_papers_recipe():
    for dataset, trials in (("cifar10", 100), ("cifar100", 50)):
        chosen = load([f"dataset={dataset}", "scale=full"])
        assert (chosen.model.width, chosen.data.limit, chosen.data.name, chosen.search.trials) == (
            64,
            0,
            dataset,
            trials,
        )
        recipe = chosen.recipe("ce_dl")
        assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.momentum, recipe.weight_decay) == (
            200,
            128,
            0.01,
            0.9,
            5e-4,
        )
        assert (recipe.schedule, recipe.crop_padding, recipe.flip, recipe.warmup * recipe.epochs) == (
            "steps",
            4,
            True,
            20,
        )
        assert (recipe.loss["class_weight"], recipe.loss["client_weight"], recipe.loss["disentangle_weight"]) == (
            1,
            1,
            0.1,
        )
        assert chosen.recipe("ce").loss["disentangle_weight"] == 0
        assert chosen.recipe("no_mtl").schedule == "cosine"
        search = chosen.search
        assert (search.alpha_low, search.alpha_high, search.lambda_low, search.lambda_high) == (0.1, 100, 0.01, 10)
        tuning = chosen.finetuning
        assert (tuning.epochs, tuning.class_weights, tuning.subset_weights, tuning.lr) == (
            3, [0, 0.05, 0.1, 0.3, 0.5], [0.2, 1, 2], 1e-4,
        )  # fmt: skip
        assert chosen.ablation.epochs == 60


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "folder"])
def test_every_data_set_has_two_scales_and_words_come_last(dataset):
    laptop, full = (load([f"dataset={dataset}", f"scale={scale}"]) for scale in ("laptop", "full"))
    assert laptop.model.width < full.model.width == 64
    assert len(laptop.study.seeds) >= 3
    assert load([f"dataset={dataset}", "scale=laptop", "model.width=24"]).model.width == 24
    assert load([f"dataset={dataset}", "data.name=digits"]).data.name == "digits"


def test_but_digits_which_have_one_whether_there_is_a_gpu_or_not():
    laptop, full = (load(["dataset=digits", f"scale={scale}"]) for scale in ("laptop", "full"))
    assert full.model_copy(update={"scale": "laptop"}) == laptop
    assert laptop.model.width == 8


def test_auto_is_laptop_without_a_gpu(monkeypatch):
    for gpu, scale in ((False, "laptop"), (True, "full")):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        assert load(["dataset=cifar10"]).scale == scale


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("study.stages=[trian]", "study.stages: trian is not one of train, retrain, unlearn, ablation, report"),
        ("study.pipelines=[dl]", "study.pipelines: dl is not one of no_mtl, ce, ce_dl"),
        ("study.seeds=[]", "study.seeds=.. leaves nothing to do"),
        ("dataset=mnist", "dataset=mnist is not one of digits, cifar10"),
        ("scale=huge", "scale=huge is not one of auto, full, laptop"),
        ("table=3", "table is no setting"),
        ("search.trials=0", r"search.trials=0 is not in 1\.\."),
        ("search.trials=many", "search.trials=many is not a whole number in 1"),
        ("search.trials=*/seed0", r"search.trials=\*/seed0: a value cannot be read"),
        ("search.reading=power", "search.reading=power is not one of threshold, exponent"),
        ("study.order=[10]", r"client 10 is not in 0\.\.9"),
        ("study.order=[1,1]", "names a client twice"),
        ("clients=3", "leaves no client: 3 in all"),
        ("ablation.fractions=[0.5]", "different lengths"),
        ("ablation.fractions=[0.1,0.2,1.5]", "are not in"),
        ("search.alpha_low=200", "search.alpha_low=200.0 is not below search.alpha_high=100.0"),
        ("study.seeds=[0,0]", "are not different numbers"),
        ("study.seeds=[-1]", "are not different numbers in 0.."),
        ("study.clip=/no/such/file", "study.clip=/no/such/file is no file"),
        ("model.client_head=false", "study.pipelines says which heads"),
    ],
)
def test_bad_settings_get_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        load(words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "part", "same"),
    [
        ("search.threshold=3", "search", True),
        ("search.threshold=3 search.reading=exponent", "search", False),
        ("search.mia_weight=3", "search", True),
        ("search.mia_weight=3 search.objective=weighted", "search", False),
        ("search.trials=3", "search", False),
        ("fisher.batch_size=3", "fisher", True),
        ("fisher.batch_size=3 fisher.estimator=batch", "fisher", False),
        ("fisher.precision=bf16", "fisher", False),
    ],
)
def test_results_depend_on_what_changes_them(words, part, same):
    _, *others = words.split()
    assert (load(words.split()).depends_on(part) == load(others).depends_on(part)) == same


def test_every_setting_has_a_description():
    assert not [name for name, declared in fields_of(PaperSettings) if not declared.description]


def test_text_is_taken_as_it_was_typed():
    for text in ("2024", "1.10", "695e0514", "true", "/a # b", "*/seed0", "a: b"):
        assert load([f"study.name={text}"]).study.name == text


def test_a_setting_that_is_misspelt_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"serach.trials is no setting: did you mean search.trials\?"):
        load(["serach.trials=3"])
