"""Nothing is unpickled: a pickle that would leave a canary is planted wherever a stranger's run or data set has a file."""

import ast
import io
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch

from distcond.cli import main
from distcond.compose import save_config
from distcond.config import DataConfig
from distcond.data.tasks import build_task
from distcond.errors import DataError
from tests.helpers import run_ranks, small_config, train_here

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (_touch, (str(self.canary),))


def _touch(path: str) -> None:
    Path(path).touch()


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """Where a payload would leave its file, by the time the test ends."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


def as_pickle(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def as_torch(canary: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"module": Payload(canary)}, stream)
    return stream.getvalue()


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(as_pickle(tmp_path / "one"))
    torch.load(io.BytesIO(as_torch(tmp_path / "two")), weights_only=False)
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps; not to be changed."""
    config = small_config(tmp_path_factory.mktemp("finished"))
    run_ranks(train_here, 1, config)
    folder = Path(config.run.dir) / config.run.name
    save_config(config, folder / "config.yaml")
    return folder


def plant(folder: Path, name: str, data: bytes, *, sealed: bool) -> None:
    """Write a file into the run; sealed: the manifest of the checkpoint agrees, as whoever wants it read would see to."""
    from distcond.train.checkpoint import MANIFEST, fingerprint
    from distcond.train.run_folder import write_json

    found = list(folder.glob(name))
    (found[0] if found else folder / name).write_bytes(data)
    if sealed:
        checkpoint = folder / LAST
        files = {file.name: fingerprint(file) for file in checkpoint.iterdir() if file.name != MANIFEST}
        write_json(checkpoint / MANIFEST, files)


LAST = "checkpoints/step_00000004"
READ = [f"{LAST}/dense.safetensors", f"{LAST}/tables_*.safetensors", f"{LAST}/state.json"]
OTHERS = [f"{LAST}/mp_rank_00_model_states.pt", f"{LAST}/evil.pkl"]
"What DeepSpeed would unpickle, and what nobody reads."


@pytest.mark.parametrize("make", [as_pickle, as_torch])
@pytest.mark.parametrize("name", [*READ, *OTHERS, f"{LAST}/manifest.json", "checkpoints/latest", "summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("sealed", [True, False])
def test_no_file_of_a_run_is_unpickled_by_evaluate(
    finished: Path,
    name: str,
    sealed: bool,
    make: Callable[[Path], bytes],
    canary: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distcond.evaluate.latency.LONGEST_CALL_S", 0.0)  # one example at a time is timed, once
    monkeypatch.setattr("distcond.evaluate.latency.MOST_REPEATS", 1)
    shutil.copytree(finished, tmp_path / "run")
    plant(tmp_path / "run", name, make(canary), sealed=sealed and name in READ + OTHERS)
    step = ["--step", "4"] if name.startswith(LAST) else []  # without, an older checkpoint is taken in place of a damaged one
    status = main(["evaluate", str(tmp_path / "run"), *step])
    err = capsys.readouterr().err
    assert (status == 2 and err.count("\n") == 1) or (status, err) == (0, "")


@pytest.mark.parametrize("name", [*READ, *OTHERS, "summary.json", "metrics.jsonl"])
def test_no_file_of_a_run_is_unpickled_by_going_on(finished: Path, name: str, canary: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    plant(tmp_path / "run", name, as_pickle(canary), sealed=name in READ + OTHERS)
    with pytest.raises(AssertionError, match=r"RunError: .* choose another step") if name in READ else nullcontext():
        run_ranks(train_here, 1, small_config(tmp_path, train__max_steps=6, checkpoint__every=6))


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:pathlib.Path.touch [{canary}]\n",
        "seed: !!python/object/apply:builtins.open [{canary}, w]\n",
        "run: !!python/object/new:type {{args: [x, [], {{}}], state: {{}}}}\n",
        "run: {{name: !!python/name:os.abort ''}}\n",
    ],
)
def test_a_configuration_with_a_python_object_is_refused(
    finished: Path, text: str, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text.format(canary=canary))
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("could not determine a constructor for the tag") == err.count("\n") == 2


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` reads this where it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        yield


def hub(folder: Path, path: str, *files: str, column: str = "text") -> None:
    build_task(DataConfig(name="hub", path=path, column=column, files=list(files), cache_dir=str(folder / "cache"), context=1))


@pytest.mark.parametrize("name", ["manifest.json", "train.bin"])
def test_a_prepared_corpus_with_a_pickle_is_refused(name: str, canary: Path, tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"some text {number} " * 20)
    config = DataConfig(name="text", files=[str(tmp_path / "*.txt")], cache_dir=str(tmp_path / "cache"), context=4)
    build_task(config)
    (file,) = (tmp_path / "cache").rglob(name)
    file.write_bytes(as_pickle(canary))
    with pytest.raises(DataError, match=r"The prepared corpus .* is damaged"):
        build_task(config)


def test_a_text_file_that_is_a_pickle_is_bytes(canary: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.npy").write_bytes(as_pickle(canary) * 100)
    build_task(DataConfig(name="text", files=[str(tmp_path / "evil.npy")], cache_dir=str(tmp_path / "cache"), context=4))


@pytest.mark.parametrize("builder", ["pandas", "webdataset", "json", "parquet", "arrow", "csv", "hdf5"])
def test_no_builder_of_data_sets_unpickles(builder: str, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(as_pickle(canary))
    with pytest.raises(DataError) as told:
        hub(tmp_path, builder, str(tmp_path / "evil.pkl"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("ending", ["pkl", "pickle", "pyd", "pth", "npy", "npz"])
def test_a_folder_of_archives_with_pickles_is_refused(ending: str, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "train.tar", "w") as archive:
        for name, data in {f"a.{ending}": (as_torch if ending == "pth" else as_pickle)(canary), "a.txt": b"text"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with pytest.raises(DataError) as told:
        hub(tmp_path, str(tmp_path / "set"), column=ending)
    assert "\n" not in str(told.value)


def test_an_arrow_file_with_a_pickled_type_is_refused(canary: Path, tmp_path: Path) -> None:
    """CVE-2023-47248: pyarrow below 14.0.1 unpickled the type of a column."""
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": as_pickle(canary)}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.int64(), metadata=kind)])
    (tmp_path / "set").mkdir()
    with pyarrow.ipc.new_stream(str(tmp_path / "set" / "train.arrow"), schema) as stream:
        stream.write_table(pyarrow.table([[1, 2, 3]], schema=schema))
    with pytest.raises(DataError):
        hub(tmp_path, str(tmp_path / "set"))


# --- the source -------------------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
CALLS |= {"eval", "exec", "compile", "__import__", "pd.read_pickle"}
OPTIONS = {"allow_pickle", "shell", "weights_only", "trust_remote_code"}
"No matter with which value."


def test_distcond_has_no_code_that_unpickles_or_evaluates() -> None:
    found = [
        f"{file}:{node.lineno}: {what}"
        for file in sorted((ROOT / "distcond").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        for what in _dangers(node)
    ]
    assert not found


@pytest.mark.parametrize(
    "line", ["import pickle", "from dill import loads", "torch.load(f)", "eval(x)", "f(allow_pickle=1)", "yaml.load(f)"]
)
def test_such_code_would_be_found(line: str) -> None:
    assert [what for node in ast.walk(ast.parse(line)) for what in _dangers(node)]


def _dangers(node: Any) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        yield from (name for name in names if name.partition(".")[0] in UNPICKLERS)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        yield from [called] if called in CALLS else []
        yield from (f"{called}({word.arg}=)" for word in node.keywords if word.arg in OPTIONS)
