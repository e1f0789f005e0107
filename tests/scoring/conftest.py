"""Models that the tests of this folder may read and none may change."""

from __future__ import annotations

import pytest

from tests.scoring.tiny_models import TEMPLATE, save_classifier, save_language_model


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of random classifiers, of one label each; the Llama has a chat template."""
    return {
        kind: save_classifier(str(tmp_path_factory.mktemp(kind)), kind, template=TEMPLATE if kind == "llama" else None)
        for kind in ("bert", "roberta", "electra", "llama")
    }


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of random causal language models; the Llama has a chat template."""
    return {
        kind: save_language_model(
            str(tmp_path_factory.mktemp(kind)), kind, template=TEMPLATE if kind == "llama" else None
        )
        for kind in ("llama", "gpt2", "gemma2")
    }
