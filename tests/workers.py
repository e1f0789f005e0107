"""Real processes that start at once: forked from a server that has imported what they need and has run nothing."""

import multiprocessing

WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(
    [
        "car_datasets.curation",
        "sentence_transformers",
        "sklearn.cluster",
        "sklearn.decomposition",
        "transformers.models.bert.modeling_bert",
    ]
)
