"""Settings: types, ranges, names, text as it is typed, and the ways to and from JSON."""

import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from fedunlearn import config
from fedunlearn.composing import compose
from fedunlearn.errors import UserError
from fedunlearn.federation.strategy import chosen, completed, settings_for, strategy_class, strategy_names, strategy_of
from fedunlearn.schema import fields_of, name_of, validated
from fedunlearn.study.pooled.settings import load
from fedunlearn.words import split_words

REPOSITORY = Path(__file__).parent.parent
APPS = sorted((REPOSITORY / "simulations").glob("*/conf"))
DIGITS = REPOSITORY / "simulations" / "digits" / "conf"
SCHEMAS = {"run": config.Config} | {name: strategy_class(name).Settings for name in strategy_names()}

quick = hypothesis(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("conf", APPS, ids=lambda conf: conf.parent.name)
def test_every_app_composes_and_survives_json(conf):
    composed = completed(compose(conf))
    assert config.from_json(config.to_json(composed)) == composed


def test_words_of_all_kinds():
    text = "rounds=40 unlearn.ridge=inf train.flip=true forget.schedule={6: [3], 7:[1, 2]} run=a.b-c"
    composed = completed(compose(DIGITS, text))
    assert (composed.rounds, composed.unlearn["ridge"], composed.train.flip) == (40, float("inf"), True)
    assert composed.forget.schedule == {6: [3], 7: [1, 2]}
    assert composed.run == "a.b-c"
    assert config.from_json(config.to_json(composed)) == composed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bogus=1", r"bogus is no setting \(`fedunlearn config` lists all of them\)"),
        ("round=1", r"round is no setting: did you mean rounds\?"),
        ("train.epoch=1", r"train.epoch is no setting: did you mean train.epochs\?"),
        ("batch_size=1", r"batch_size is no setting: did you mean train.batch_size\?"),
        ("++bogus=1", "bogus is no setting"),
        ("hydra.run.dir=/tmp", "hydra.run.dir is no setting"),
        ("train={epoch: 1}", r"train.epoch is no setting: did you mean train.epochs\?"),
        ("unlearn.alpha=abc", "unlearn.alpha=abc is not a number in 0..inf"),
        ("unlearn.alpha=-1", r"unlearn.alpha=-1 is not in 0..inf"),
        ("unlearn.alpha=nan", "unlearn.alpha=nan is not in"),
        ("unlearn.alpa=2", r"unlearn.alpa is no setting of strategy=ssd: did you mean unlearn.alpha\?"),
        ("unlearn.tune=often", "unlearn.tune=often is not one of auto, fixed"),
        ("strategy=sdd", r"strategy=sdd is not installed: did you mean ssd\?"),
        ("strategy=nowhere:Nothing", "strategy nowhere:Nothing: .*nowhere"),
        ("strategy=fedunlearn.config:Config", "is no subclass of fedunlearn.Strategy"),
        ("clients=1", r"clients=1 is not in 2..1000000"),
        ("rounds=abc", r"rounds=abc is not a whole number in 1..1000000"),
        ("rounds=1.5", r"rounds=1.5 is not a whole number in 1..1000000"),
        ("rounds=", "rounds= is not a whole number"),
        ("train.lr=inf", "train.lr=inf is not in 0..100"),
        ("train.lr=nan", "train.lr=nan is not in 0..100"),
        ("loss.pull=nan", "loss.pull=nan is not in"),
        ("train.flip=maybe", "train.flip=maybe is not true or false"),
        ("train.schedule=often", "train.schedule=often is not one of steps, cosine, constant"),
        ("scale=huge", "scale=huge is not one of auto, full, laptop"),
        ("rounds", "'rounds' is no setting of the form name=value"),
        ("forget.schedule={3:[12]}", r"client 12 is not in 0\.\.9"),
        ("forget.schedule={999:[1]}", r"round 999 is not in 0\.\."),
        ("forget.schedule={3:[]}", "no client is named"),
        ("forget.schedule={a:[1]}", "forget.schedule is not of this form: round -> clients"),
        ("forget.schedule={4:3}", "forget.schedule is not of this form: round -> clients"),
        ("forget.schedule=[3]", r"forget.schedule=\[3\] is not of this form: round -> clients"),
        ("forget.schedule={4:[3],4:[5]}", "has 4 twice"),
        ("forget.schedule={4:[3],04:[5]}", "has 4 twice"),
        ("forget.schedule={'4':[3],4:[5]}", "has 4 twice"),
        ("forget={schedule:{4:[3],4:[5]}}", "has 4 twice"),
        ("forget.keys={3:" + 64 * "a" + ",03:" + 64 * "b" + "}", "client 3 has two keys"),
        ("rounds=true", "rounds=True is not a whole number in 1..1000000"),
        ("train.lr=false", "train.lr=False is not a whole number|train.lr=False is not a number"),
        ("data=3", "data"),
        ("data=null data.root=/x", "data"),
        ("run=../elsewhere", "is no name"),
        ("run=..", "is no name"),
        ("run=" + "x" * 201, "is longer than 200 bytes"),
        ("unlearn.loss_head=client model.client_head=false", "unlearn.loss_head=client needs model.client_head=true"),
    ],
)
@pytest.mark.parametrize("app", ["digits", "cifar10"])
def test_bad_words_get_one_line(app, words, message):
    strategy = [] if "strategy=" in words else ["strategy=ssd"]
    with pytest.raises(UserError, match=message) as caught:
        completed(compose(REPOSITORY / "simulations" / app / "conf", [*strategy, *split_words(words)]))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_app_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no config.yaml: is .* an app such as simulations/digits"):
        compose(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["1.10", "007", "null", "true", "/x/é=1", "/a b", r"C:\images", "${HOME}", "a\\", 'a"b', "[1", "", "a\nb", "#x"],
)
def test_text_is_taken_as_it_is_typed(text):
    assert compose(DIGITS, [f"data.root={text}"]).data.root == text
    assert compose(DIGITS, [f"data.root='{text}'"]).data.root == text  # for a shell within a shell


def test_a_name_that_looks_like_a_number_stays_text():
    composed = compose(DIGITS, "run=1.10 rounds=3 data.root=/x y/z home=/é=1")
    assert (composed.run, composed.rounds) == ("1.10", 3)
    assert (composed.data.root, composed.home) == ("/x y/z", "/é=1")


LOOK_LIKE_SOMETHING_ELSE = ["1.10", "1e3", "1_000", "695e0514", "true", "null", "007", "0x1f", "猫 $x$", "a=b", "${x}"]


@pytest.mark.parametrize("read", [lambda words: compose(DIGITS, words), lambda words: load(words)])
def test_text_in_lists_stays_as_it_is_typed_in_runs_and_in_studies(read):
    texts = [form for text in LOOK_LIKE_SOMETHING_ELSE for form in (text, f"'{text}'", f'"{text}, b"')]
    found = read([f"data.columns=[{', '.join(texts)}]", "data.label=1.10"])
    assert found.data.columns == [form for text in LOOK_LIKE_SOMETHING_ELSE for form in (text, text, f"{text}, b")]
    assert found.data.label == "1.10"


def test_keys_that_look_like_numbers_stay_text():
    key = "695e0514" * 8
    words = [f"forget.keys={{3: {key}, 0: '{key}'}}", f"forget.keys.1={key}"]
    assert compose(DIGITS, words).forget.keys == {3: key, 0: key, 1: key}
    assert compose(DIGITS, " ".join(words)).forget.keys == {3: key, 0: key, 1: key}
    assert compose(DIGITS, [f"forget={{keys: {{3: {key}}}, budget: 0.5}}"]).forget.keys == {3: key}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.columns=[a", "data.columns=.a cannot be read"),
        ("data.columns=['a'b]", None),
        ("data.columns=[a] b", "cannot be read: a bracket"),
        ("data.columns=a", "data.columns=a"),
        ("data.window=[3]", r"data.window=\[3.0\] is not \[low,high\]"),
        ("data.window=[3,3]", "with a low value below the high one"),
        ("data.window=[0,inf]", "with a low value below the high one"),
    ],
)
def test_lists_that_are_none_are_named(word, message):
    if message is None:
        assert compose(DIGITS, [word]).data.columns == ["'a'b"]
        return
    with pytest.raises(UserError, match=message):
        compose(DIGITS, [word])


def test_text_of_a_strategy_needs_quotes_where_it_looks_like_a_number_and_the_line_says_so():
    class Own(config.Settings):
        which: str = ""

    unquoted, quoted = (compose(DIGITS, [f"unlearn.which={text}"]).unlearn for text in ("1.10", '"1.10"'))
    with pytest.raises(UserError, match=r"unlearn\.which=1\.1 is not text: in quotes within quotes it stays"):
        validated(Own, unquoted, prefix="unlearn.")
    assert validated(Own, quoted, prefix="unlearn.").which == "1.10"


@pytest.mark.parametrize("quote", "'\"")
def test_a_quoted_text_may_have_what_looks_like_a_setting(quote):
    words = f"rounds=3 data.root={quote}/my data x=1/b{quote} run=a"
    found = compose(DIGITS, words)
    assert (found.rounds, found.data.root, found.run) == (3, "/my data x=1/b", "a")


def test_groups_may_be_given_as_mappings():
    words = ["train={lr: 0.5, epochs: 3}", "unlearn={alpha: 3}", "forget={schedule: {3: [1]}}", "data={limit: 9}"]
    composed = compose(DIGITS, [*words, "train.epochs=4"])
    assert (composed.train.lr, composed.train.epochs, composed.train.batch_size) == (0.5, 4, 16)
    assert (composed.unlearn, composed.forget.schedule) == ({"alpha": 3}, {3: [1]})
    assert (composed.data.limit, composed.data.mirror) == (9, False)


def test_the_last_of_several_values_counts():
    composed = compose(DIGITS, "rounds=3 run=a rounds=4 run=b")
    assert (composed.rounds, composed.run) == (4, "b")


def test_scale_auto_is_laptop_without_a_gpu_and_full_with_one(monkeypatch):
    conf = REPOSITORY / "simulations/cifar10/conf"
    for gpu, scale, width in ((False, "laptop", 16), (True, "full", 64)):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        for words in ("", "scale=auto"):
            composed = compose(conf, words)
            assert (composed.scale, composed.model.width) == (scale, width)
    assert compose(conf, "scale=laptop model.width=32").model.width == 32


def test_a_setting_that_is_no_more_is_named():
    with pytest.raises(UserError, match="weight is no setting of this version"):
        config.from_json('{"loss": {"weight": 0.5}}')
    with pytest.raises(UserError, match=r"rounds=0 is not in 1\.\.1000000"):
        config.from_json('{"rounds": 0}')


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(Exception, match="frozen"):
        config.Config().rounds = 3


def test_the_papers_values_are_the_defaults():
    loss = config.Config().loss.model_dump()
    paper = {"class_weight": 1, "client_weight": 1, "disentangle_weight": 0.1, "pull": 1, "push": 1, "margin": 1}
    assert paper.items() <= loss.items()
    composed = compose(REPOSITORY / "simulations/cifar100/conf", "scale=full")
    assert (composed.rounds, composed.model.width, composed.data.limit) == (200, 64, 0)
    assert composed.loss.warmup * composed.rounds == 20


def test_every_setting_of_a_run_and_of_every_strategy_says_what_it_is():
    silent = [f"{of} {n}" for of, schema in SCHEMAS.items() for n, f in fields_of(schema) if not f.description]
    assert not silent


def test_state_home_prefers_the_setting_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path))
    assert config.state_home() == tmp_path
    assert config.state_home("~/here") == Path.home() / "here"
    monkeypatch.delenv("FEDUNLEARN_HOME")
    assert config.state_home() == Path.home() / ".fedunlearn"


# --- the settings of a strategy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", strategy_names())
def test_every_installed_strategy_has_defaults_that_survive_json(name):
    composed = completed(config.Config(strategy=name))
    assert composed.unlearn == settings_for(name, {}).model_dump()
    assert config.from_json(config.to_json(composed)) == completed(composed) == composed


def test_settings_of_a_strategy_are_completed_and_checked():
    composed = completed(config.Config(strategy="ssd", unlearn={"alpha": 3}))
    assert (composed.unlearn["alpha"], composed.unlearn["tune"]) == (3.0, "fixed")  # since alpha is named
    assert completed(config.Config(strategy="ssd", unlearn={"alpha": 3, "tune": "auto"})).unlearn["tune"] == "auto"
    assert chosen(completed(config.Config(strategy="ssd")), ["unlearn.alpha=8"])["unlearn"]["tune"] == "fixed"
    assert strategy_of(composed).settings.alpha == 3.0
    with pytest.raises(UserError, match=r"unlearn.freeze_fraction is no setting of strategy=ssd"):
        strategy_of(config.Config(strategy="ssd", unlearn={"freeze_fraction": 0.5}))


def test_a_value_below_a_free_mapping_has_a_name_of_its_own():
    values = config.values_of(config.Config(unlearn={"alpha": 3}, forget=config.Forget(schedule={2: [1]})))
    assert values["unlearn.alpha"] == 3
    assert values["forget.schedule"] == {2: [1]}
    assert "unlearn" not in values


# --- properties ---------------------------------------------------------------------------------------------------

NUMBERS = st.floats(0, 100, allow_nan=False)
CONFIGS = st.builds(
    config.Config,
    run=st.text(),
    strategy=st.sampled_from(["ssd", "subset", "own:Strategy"]),
    rounds=st.integers(1, 10**6),
    fraction=st.floats(0, 1),
    data=st.builds(config.Data, root=st.text(), limit=st.integers(0, 10**9), mirror=st.booleans()),
    loss=st.builds(config.Loss, pull=NUMBERS | st.just(float("inf"))),
    unlearn=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | NUMBERS | st.text()),
    forget=st.builds(config.Forget, schedule=st.dictionaries(st.integers(0, 99), st.lists(st.integers(0, 99)))),
)


@hypothesis(quick, max_examples=40)
@given(CONFIGS)
def test_json_gives_the_same_settings_back(made):
    text = config.to_json(made)
    assert "\n" not in text
    assert config.from_json(text) == made
    assert config.to_json(config.from_json(text)) == text


NAMES = st.sampled_from(["rounds", "data.root", "unlearn.alpha", "++unlearn.alpha", "forget.schedule", "a@b/c"])
VALUES = st.text(string.ascii_letters + string.digits + "/.:,é ", max_size=12).map(str.strip)


@quick
@given(st.lists(st.tuples(NAMES, VALUES)), st.sampled_from([" ", "  ", "\t", "\n"]))
def test_words_that_are_joined_are_split_again(pairs, gap):
    words = [f"{name}={value}" for name, value in pairs]
    assert split_words(gap.join(words)) == words
    assert [name_of(word) for word in words] == [name.lstrip("+") for name, _ in pairs]


@quick
@given(st.text())
def test_splitting_loses_nothing_but_space(text):
    words = split_words(text)
    assert "".join("".join(words).split()) == "".join(text.split())
    assert all(word.strip() for word in words)


@hypothesis(deadline=None, max_examples=10)
@given(st.text().filter(lambda text: text[:1] not in ("'", '"')))
def test_any_text_arrives(text):
    assert compose(DIGITS, [f"data.root={text}"]).data.root == text


# --- what a look at the ledger must not wait for ------------------------------------------------------------------


@pytest.mark.parametrize("module", ["fedunlearn.cli", "fedunlearn.config", "fedunlearn.runs.ledger"])
def test_the_command_line_and_the_ledger_import_nothing_heavy(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'flwr', 'ray', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
