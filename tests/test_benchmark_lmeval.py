"""Our scores beside lm-evaluation-harness's, on the same model and the same rows."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from statespan.benchmarks.catalog import DATA_SETS, FIXTURES
from statespan.benchmarks.choice_tasks import CHOICE_TASKS
from statespan.benchmarks.evaluate import evaluate
from statespan.benchmarks.lmeval import adapter, run_tasks
from statespan.benchmarks.records import read_rows
from statespan.benchmarks.table import build_benchmark
from statespan.errors import UserError
from statespan.models.hook import VANILLA, Method
from statespan.models.runner import Runner
from statespan.models.tokenizer import Tokenizer
from tests.tiny import byte_tokenizer, tiny_model

Engine = tuple[Runner, Method, Tokenizer]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return Runner(tiny_model(seed=3)), VANILLA, Tokenizer(path)


@pytest.fixture(scope="module")
def harness(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The harness's own task definitions, pointed at our rows."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the optional extra: pip install 'statespan[lmeval]'")
    tasks = Path(lm_eval.__file__).parent / "tasks"
    folder = tmp_path_factory.mktemp("lmeval_tasks")
    definitions = {
        "hellaswag": "hellaswag/hellaswag.yaml",
        "piqa": "piqa/piqa.yaml",
        "arc_easy": "arc/arc_easy.yaml",
        "arc_challenge": "arc/arc_challenge.yaml",
        "winogrande": "winogrande/default.yaml",
        "openbookqa": "openbookqa/openbookqa.yaml",
    }
    for task, definition in definitions.items():
        rows = FIXTURES / DATA_SETS[CHOICE_TASKS[task].data_set].files[1]
        (folder / f"{task}.yaml").write_text(
            f"include: {tasks / definition}\ntask: {task}_rows\ndataset_path: json\ndataset_name: null\n"
            f"training_split: null\nvalidation_split: null\ntest_split: test\nfewshot_split: null\n"
            f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        )
    found = run_tasks(*engine, [f"{task}_rows" for task in definitions], include_path=folder)
    results: Mapping[str, Any] = found["results"]
    return results


@pytest.mark.parametrize("task", sorted(CHOICE_TASKS))
@pytest.mark.parametrize("measure", ["acc", "acc_norm"])
def test_our_accuracy_is_the_harness_own(task: str, measure: str, harness: Mapping[str, Any], engine: Engine) -> None:
    if f"{measure},none" not in harness[f"{task}_rows"]:
        pytest.skip(f"the harness has no {measure} for {task}")
    runner, method, tokenizer = engine
    benchmark = build_benchmark("short_context", {"tasks": [task], "measure": measure, "data_root": "fixtures"})
    samples = list(benchmark.samples(tokenizer))
    scores = [result.score for result in evaluate(runner, method, benchmark, samples, tokenizer)]
    assert sum(scores) / len(scores) == harness[f"{task}_rows"][f"{measure},none"]


@pytest.mark.parametrize("task", sorted(CHOICE_TASKS))
def test_our_log_likelihoods_are_those_the_harness_is_given(task: str, engine: Engine) -> None:
    pytest.importorskip("lm_eval", reason="needs the optional extra: pip install 'statespan[lmeval]'")
    runner, method, tokenizer = engine
    benchmark = build_benchmark("short_context", {"tasks": [task], "data_root": "fixtures"})
    results = evaluate(runner, method, benchmark, list(benchmark.samples(tokenizer)), tokenizer)
    rows = read_rows(FIXTURES / DATA_SETS[task].files[1], CHOICE_TASKS[task].schema)
    for result, row in zip(results, rows, strict=True):
        item = CHOICE_TASKS[task].item(row)
        contexts = item.contexts if len(item.contexts) > 1 else item.contexts * len(item.choices)
        asked = [SimpleNamespace(args=(c, f" {choice}")) for c, choice in zip(contexts, item.choices, strict=True)]
        ours = [one.total for one in result.completion.likelihoods]
        if len(item.contexts) > 1:
            ours = [whole - context for whole, context in zip(ours[::2], ours[1::2], strict=True)]
        assert ours == pytest.approx([total for total, _ in adapter(*engine).loglikelihood(asked)], rel=1e-9)


def test_the_adapter_scores_generates_and_rolls(engine: Engine) -> None:
    pytest.importorskip("lm_eval", reason="needs the optional extra: pip install 'statespan[lmeval]'")
    lm = adapter(*engine)
    ab, abc = (lm.loglikelihood([SimpleNamespace(args=("a", text))])[0][0] for text in ("b", "bc"))
    together = lm.loglikelihood([SimpleNamespace(args=args) for args in (("a", "b"), ("x", "y"), ("a", "bc"))])
    assert [together[0][0], together[2][0]] == pytest.approx([ab, abc], rel=1e-9) and abc < ab < 0
    whole = lm.loglikelihood_rolling([SimpleNamespace(args=("ab",))])[0]
    parts = lm.loglikelihood([SimpleNamespace(args=("", "ab"))])[0][0]
    assert whole == pytest.approx(parts, rel=1e-9)  # both after the end-of-text token
    text = lm.generate_until([SimpleNamespace(args=("a", {"max_gen_toks": 5}))])[0]
    stopped = lm.generate_until([SimpleNamespace(args=("a", {"max_gen_toks": 5, "until": [text[2]]}))])[0]
    assert stopped == text[: text.index(text[2])]


def test_a_task_the_harness_does_not_know_is_refused(engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the optional extra: pip install 'statespan[lmeval]'")
    with pytest.raises(UserError, match="knows no task named 'nonsense'"):
        run_tasks(*engine, ["nonsense"], include_path=tmp_path)


def test_without_the_harness_the_way_out_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'statespan\[lmeval\]'"):
        adapter(*engine)
